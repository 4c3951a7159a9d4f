// Package metrics owns the names of the network service's metrics.
//
// The rule it keeps: labels come from fixed sets in our code, never from what a
// client or a node sends, so nobody outside can make the number of series grow.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics are the collectors of one service, on a registry of their own. Safe
// for concurrent use.
type Metrics struct {
	registry *prometheus.Registry

	Jobs          *prometheus.CounterVec   // finished jobs; outcome
	Results       *prometheus.CounterVec   // results from nodes; verdict
	Dispatches    prometheus.Counter       // job frames handed to sessions
	Reassignments *prometheus.CounterVec   // jobs taken from a node; reason
	Replays       *prometheus.CounterVec   // jobs given out again to compare; verdict
	FramesRefused *prometheus.CounterVec   // ended a session; reason
	Sessions      *prometheus.CounterVec   // ended sessions; reason
	Registrations *prometheus.CounterVec   // outcome
	Bindings      *prometheus.CounterVec   // requests about a node's account; step, outcome
	Mails         *prometheus.CounterVec   // tries to send one; outcome
	Requests      *prometheus.CounterVec   // HTTP; route, code
	JobSeconds    *prometheus.HistogramVec // arrival to answer; stream
	FirstByte     prometheus.Histogram     // arrival to the first byte of a stream
	Crowded       prometheus.Counter       // connections that were closed at once
	Discarded     prometheus.Counter       // results that went before their time
	Unrecorded    prometheus.Counter       // sandboxes that receipts name and there is no record of
	OtherClass    prometheus.Counter       // receipts that name another determinism class than their node did before
	StoreSeconds  *prometheus.HistogramVec // durable writes; op
	Heads         *prometheus.CounterVec   // of nodes' receipt logs; verdict
	Leaves        prometheus.Counter       // of these logs, stored
	LogResets     prometheus.Counter       // logs that began anew
	LeftOut       prometheus.Counter       // receipts that a log has gone on without
	LogsDamaged   prometheus.Counter       // findings that a copy of a log is damaged
}

// State is what gauges read when they are collected.
type State struct {
	Connected, Routable, Queued, Running int
	ConfigVersion                        int64
	ConfigExpires                        time.Time
	MetadataExpires                      map[string]time.Time // by TUF role
	StoreFree                            int64                // bytes
	StoreAccepting                       bool
	StoreReopened                        int
	StoreDamaged                         map[string]int64 // records by what became of them
	StoreLost                            int              // records that are lost and not forgotten
	Unlogged, Overdue                    int              // receipts that are not in their node's log
	Odd, Disputed                        int              // nodes whose golden answers are not those of their class
}

// New makes the collectors. state is called for each collection.
func New(state func() State) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "resultity", Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, start float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "resultity", Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(start, 2.5, 12),
		}, labels)
	}
	m := &Metrics{
		registry:      prometheus.NewRegistry(),
		Jobs:          counter("jobs_total", "Finished jobs by outcome.", "outcome"),
		Results:       counter("results_total", "Results received from nodes by verdict.", "verdict"),
		Reassignments: counter("reassignments_total", "Jobs taken from a node by reason.", "reason"),
		Replays:       counter("replays_total", "Jobs that the operator had given out again, by what comparing the answers came to.", "verdict"),
		FramesRefused: counter("frames_refused_total", "Frames that ended a session by reason.", "reason"),
		Sessions:      counter("sessions_ended_total", "Ended sessions by reason.", "reason"),
		Registrations: counter("registrations_total", "Registration requests by outcome.", "outcome"),
		Bindings:      counter("binding_requests_total", "Requests about the account of a node by step and outcome.", "step", "outcome"),
		Mails:         counter("mail_tries_total", "Tries to hand a message to the mail server by outcome.", "outcome"),
		Requests:      counter("http_requests_total", "HTTP requests by route and status code.", "route", "code"),
		Dispatches:    prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "dispatches_total", Help: "Jobs handed to nodes, repetitions included."}),
		JobSeconds:    histogram("job_seconds", "Time from a job's arrival to its answer.", 0.001, "outcome"),
		FirstByte:     prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "resultity", Name: "first_byte_seconds", Help: "Time from a streamed job's arrival to its first byte.", Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 12)}),
		Crowded:       prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "connections_refused_total", Help: "Connections closed at once, since there were too many."}),
		Discarded:     prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "results_discarded_total", Help: "Results deleted before their time, for want of room."}),
		Unrecorded:    prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "sandboxes_unrecorded_total", Help: "Sandboxes that receipts name and that there is no record of, counted once in a session."}),
		OtherClass:    prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "receipts_of_another_class_total", Help: "Receipts that name another determinism class than the node's heartbeats when it was given the job."}),
		StoreSeconds:  histogram("store_seconds", "Time of one durable write.", 0.00005, "op"),
		Heads:         counter("receipt_log_heads_total", "Heads of nodes' receipt logs by verdict; repeated ones are not counted.", "verdict"),
		Leaves:        prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "receipt_log_leaves_total", Help: "Receipts in nodes' logs that were stored."}),
		LogResets:     prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "receipt_log_resets_total", Help: "Receipt logs of nodes that the operator has had begin anew."}),
		LeftOut:       prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "receipts_left_out_total", Help: "Receipts that the log of their node has gone on without."}),
		LogsDamaged:   prometheus.NewCounter(prometheus.CounterOpts{Namespace: "resultity", Name: "receipt_log_damaged_total", Help: "How often a copy of a receipt log was found to be damaged in the store."}),
	}
	m.registry.MustRegister(m.Jobs, m.Results, m.Dispatches, m.Reassignments, m.Replays, m.FramesRefused, m.Sessions, m.Registrations, m.Bindings, m.Mails,
		m.Requests, m.JobSeconds, m.FirstByte, m.Crowded, m.Discarded, m.Unrecorded, m.OtherClass, m.StoreSeconds, m.Heads, m.Leaves, m.LogResets, m.LeftOut, m.LogsDamaged, gauges{state},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// gauges reads the service's state at the moment of collection.
type gauges struct{ state func() State }

var (
	nodesDesc    = prometheus.NewDesc("resultity_nodes", "Nodes by state; routable ones are connected too. odd: most of at least three nodes of its determinism class give other golden answers. disputed: its class gives several, and none is of most.", []string{"state"}, nil)
	jobsDesc     = prometheus.NewDesc("resultity_jobs", "Unfinished jobs by state.", []string{"state"}, nil)
	versionDesc  = prometheus.NewDesc("resultity_config_version", "Version of the active configuration.", nil, nil)
	freeDesc     = prometheus.NewDesc("resultity_store_free_bytes", "Bytes free on the file system of the store.", nil, nil)
	acceptDesc   = prometheus.NewDesc("resultity_store_accepting", "1, or 0 when no new requests are taken since the store's disk is full or takes no writes.", nil, nil)
	reopenDesc   = prometheus.NewDesc("resultity_store_reopened_total", "How often the store was opened anew after a write error.", nil, nil)
	damagedDesc  = prometheus.NewDesc("resultity_store_damaged_total", "Damaged records of the store that were found, by what became of them. Any of them means that a disk or the memory fails.", []string{"outcome"}, nil)
	lostDesc     = prometheus.NewDesc("resultity_store_lost", "Records of the store that are lost by damage and that nothing has taken the place of; see resultity-network damage list.", nil, nil)
	metadataDesc = prometheus.NewDesc("resultity_metadata_expires_seconds", "Unix time until which the newest TUF metadata of a role is valid; root and targets need people.", []string{"role"}, nil)
	unloggedDesc = prometheus.NewDesc("resultity_receipts_unlogged", "Receipts of results that are not in the log of their node by state; an overdue one should have been two heartbeats ago, and is waiting too.", []string{"state"}, nil)
	expiresDesc  = prometheus.NewDesc("resultity_config_expires_seconds", "Unix time at which the signature of the configuration must have been renewed.", nil, nil)
)

func (gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{nodesDesc, jobsDesc, versionDesc, expiresDesc, metadataDesc, freeDesc, acceptDesc, reopenDesc, damagedDesc, lostDesc, unloggedDesc} {
		ch <- d
	}
}

func (g gauges) Collect(ch chan<- prometheus.Metric) {
	s := g.state()
	put := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	put(nodesDesc, float64(s.Connected), "connected")
	put(nodesDesc, float64(s.Routable), "routable")
	put(nodesDesc, float64(s.Odd), "odd")
	put(nodesDesc, float64(s.Disputed), "disputed")
	put(jobsDesc, float64(s.Queued), "queued")
	put(jobsDesc, float64(s.Running), "running")
	put(unloggedDesc, float64(s.Unlogged), "waiting")
	put(unloggedDesc, float64(s.Overdue), "overdue")
	put(versionDesc, float64(s.ConfigVersion))
	put(expiresDesc, float64(s.ConfigExpires.Unix()))
	for role, at := range s.MetadataExpires {
		put(metadataDesc, float64(at.Unix()), role)
	}
	put(freeDesc, float64(s.StoreFree))
	accepting := 0.0
	if s.StoreAccepting {
		accepting = 1
	}
	put(acceptDesc, accepting)
	ch <- prometheus.MustNewConstMetric(reopenDesc, prometheus.CounterValue, float64(s.StoreReopened))
	for outcome, n := range s.StoreDamaged {
		ch <- prometheus.MustNewConstMetric(damagedDesc, prometheus.CounterValue, float64(n), outcome)
	}
	put(lostDesc, float64(s.StoreLost))
}
