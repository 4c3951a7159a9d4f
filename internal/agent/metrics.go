package agent

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
)

// What is measured. Each collection asks the agent as it is then.
var (
	metricInfo       = prometheus.NewDesc("resultity_agent_info", "Always 1; the labels say who this is.", []string{"version", "node"}, nil)
	metricGate       = prometheus.NewDesc("resultity_gate_open", "1 where a gate between the node and its jobs is open; without a network it is the machine's.", []string{"gate", "network"}, nil)
	metricSlots      = prometheus.NewDesc("resultity_slots", "Jobs that the node can run at once for a network.", []string{"network"}, nil)
	metricBusy       = prometheus.NewDesc("resultity_jobs_running", "Jobs of a network that run.", []string{"network"}, nil)
	metricOutbox     = prometheus.NewDesc("resultity_results_unacknowledged", "Results that a network has not acknowledged.", []string{"network"}, nil)
	metricLog        = prometheus.NewDesc("resultity_receipt_log_size", "Receipts in the log of a network.", []string{"network"}, nil)
	metricLogAcked   = prometheus.NewDesc("resultity_receipt_log_acknowledged", "Receipts of the log that the network has; what is missing for long can be proven to nobody.", []string{"network"}, nil)
	metricDamage     = prometheus.NewDesc("resultity_store_damage", "What the agent's start has found damaged in the job store: places that were mended, jobs and receipts that are lost. Above 0, look at the disk.", []string{"network", "outcome"}, nil)
	metricRuntime    = prometheus.NewDesc("resultity_runtime_state", "1 for the state that the runtime is in as a network is told.", []string{"network", "state"}, nil)
	metricRestarts   = prometheus.NewDesc("resultity_runtime_restarts", "Restarts of the runtime by systemd since it was started.", nil, nil)
	metricCurrent    = prometheus.NewDesc("resultity_generation_current", "Number of the current generation, 0 for none.", nil, nil)
	metricGeneration = prometheus.NewDesc("resultity_generation_state", "1 for the state that a generation is in.", []string{"generation", "state"}, nil)
	metricChecks     = prometheus.NewDesc("resultity_validations_total", "Validations since the agent's start by why they were made, and whether the answers were as expected.", []string{"network", "cause", "result"}, nil)
	metricChecked    = prometheus.NewDesc("resultity_validation_timestamp_seconds", "Unix time of the last validation.", []string{"network"}, nil)
	metricPassed     = prometheus.NewDesc("resultity_validation_passed", "1 where the last validation found the answers as expected.", []string{"network"}, nil)
	metricPhase      = prometheus.NewDesc("resultity_generation_phase_seconds", "How long a phase of the last switch to a generation took.", []string{"generation", "phase"}, nil)
	metricGivenBytes = prometheus.NewDesc("resultity_models_given_bytes_total", "Bytes of models given to neighbours.", nil, nil)
	metricGiven      = prometheus.NewDesc("resultity_models_given_answers_total", "Requests of neighbours that were given a file or a part of one.", nil, nil)
	metricGivenNot   = prometheus.NewDesc("resultity_models_given_refused_total", "Connections and requests of neighbours that were refused.", nil, nil)
	metricNeighbours = prometheus.NewDesc("resultity_models_given_connections", "Connections of neighbours.", nil, nil)
)

// collector makes metrics of an agent.
type collector struct{ *Agent }

// Describe implements [prometheus.Collector].
func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{metricInfo, metricGate, metricSlots, metricBusy, metricOutbox, metricLog, metricLogAcked, metricDamage, metricRuntime, metricRestarts, metricCurrent, metricGeneration, metricPhase, metricGivenBytes, metricGiven, metricGivenNot, metricNeighbours, metricChecks, metricChecked, metricPassed} {
		out <- d
	}
}

// Collect implements [prometheus.Collector].
func (c collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := c.Status()
	gauge(metricInfo, 1, s.Version, s.Node)
	for _, g := range s.Gates {
		open := 0.0
		if g.State == gate.Open {
			open = 1
		}
		gauge(metricGate, open, g.Name, g.Network)
	}
	for i := range s.Networks {
		n := &s.Networks[i]
		gauge(metricSlots, float64(n.Slots-n.Taken), n.Name)
		gauge(metricBusy, float64(n.Busy), n.Name)
		gauge(metricOutbox, float64(n.Outbox), n.Name)
		if l := n.ReceiptLog; l != nil {
			gauge(metricLog, float64(l.Size), n.Name)
			gauge(metricLogAcked, float64(l.Acked), n.Name)
		}
		d := n.Damage
		if d == nil {
			d = new(control.Damage)
		}
		gauge(metricDamage, float64(d.Mended), n.Name, "mended")
		gauge(metricDamage, float64(len(d.Lost)), n.Name, "jobs lost")
		gauge(metricDamage, float64(d.Receipts), n.Name, "receipts lost")
		gauge(metricRuntime, 1, n.Name, n.Runtime.State)
	}
	for _, m := range c.members {
		counts := m.board.validationCounts()
		for _, cause := range causes { // also those that there were none of
			for result, n := range map[string]uint64{"passed": counts[cause].good, "failed": counts[cause].bad} {
				out <- prometheus.MustNewConstMetric(metricChecks, prometheus.CounterValue, float64(n), m.net.Name, cause, result)
			}
		}
		if v := m.board.validation(); v != nil {
			passed := 0.0
			if v.Passed {
				passed = 1
			}
			gauge(metricChecked, float64(v.At.Unix()), m.net.Name)
			gauge(metricPassed, passed, m.net.Name)
		}
	}
	gauge(metricRestarts, float64(s.Runtime.Restarts))
	if c.share != nil {
		n := c.share.Counts()
		gauge(metricNeighbours, float64(n.Connections))
		for d, v := range map[*prometheus.Desc]int64{metricGivenBytes: n.Bytes, metricGiven: n.Answers, metricGivenNot: n.Refused} {
			out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
		}
	}
	v := c.gens.View()
	gauge(metricCurrent, float64(v.Current))
	for i := range v.Generations {
		g := &v.Generations[i]
		gauge(metricGeneration, 1, strconv.Itoa(g.Number), string(g.State))
		took := map[string]float64{}
		for _, p := range g.Phases { // the disk may name one twice
			took[p.Name] = float64(p.TookMS) / 1000
		}
		for name, seconds := range took {
			gauge(metricPhase, seconds, strconv.Itoa(g.Number), name)
		}
	}
}

// Metrics implements [control.Backend].
func (a *Agent) Metrics() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{a})
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}
