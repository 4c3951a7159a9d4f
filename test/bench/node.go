package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/bench/load"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

const (
	loader = "/usr/local/bin/loader"
	agent  = "resultity-agent.service"
	slots  = 16 // of the instant engine
)

// node returns the node of the stack, which is brought up for the first who
// asks.
func (b *bench) node(ctx context.Context) (*stack.Node, error) {
	if b.s != nil {
		return b.s.Nodes[0], nil
	}
	for _, p := range []string{"engine", "loader"} {
		if err := stack.BuildProgram(ctx, b.program(p), "./test/bench/"+p); err != nil {
			return nil, err
		}
	}
	s, err := stack.Up(ctx, stack.Options{
		Host:  host.Options{Name: fmt.Sprintf("bench-%d", os.Getpid())},
		Nodes: []host.Config{{Name: "node1", Release: host.Trixie}},
		Step: func(name string, f func() error) error {
			fmt.Fprintf(os.Stderr, "bench: %s\n", name)
			return f()
		},
	})
	if err != nil {
		return nil, err
	}
	b.s = s
	n := s.Nodes[0]
	if err := n.CopyTo(b.program("loader"), loader); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	return n, n.WaitRoutable(ctx)
}

func (b *bench) program(name string) string { return filepath.Join(b.dir, "bin", name) }

// instantNode is node with the instant engine in place of the real one.
func (b *bench) instantNode(ctx context.Context) (*stack.Node, error) {
	n, err := b.node(ctx)
	if err != nil || b.fast {
		return n, err
	}
	program, err := os.ReadFile(b.program("engine"))
	if err != nil {
		return nil, err
	}
	ref, err := b.s.PushEngine(ctx, b.s.Reg, "instant", program)
	if err != nil {
		return nil, err
	}
	err = b.s.Publish(ctx, func(c *snapshot.Config) {
		c.Runtime.Image = ref
		c.Runtime.Settings.Slots = slots
		c.Validation.Golden = []snapshot.Golden{{Name: "words", Prompt: "words", Answers: []string{instant.Text(8)}, Tokens: 8, Timeout: 20}}
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	b.fast = true
	return n, n.WaitStatus(ctx, "the instant engine", func(s *control.Status) bool {
		return s.GetsJobs() && s.Runtime.Image == ref.Digest()
	})
}

// load runs ops on the node's host. All answers must be exact.
func (b *bench) load(ctx context.Context, n *stack.Node, ops ...load.Op) ([]load.Outcome, error) {
	out, err := b.tryLoad(ctx, n, 0, ops...)
	for _, o := range out {
		if o.Exact < o.Requests {
			return nil, fmt.Errorf("%d of %d answers are wrong, the first: %s", o.Requests-o.Exact, o.Requests, o.Wrong)
		}
	}
	return out, err
}

// tryLoad runs ops on the node's host beside so many busy processes.
func (b *bench) tryLoad(ctx context.Context, n *stack.Node, busy int, ops ...load.Op) ([]load.Outcome, error) {
	uid, err := n.Output(ctx, "id", "-u", stack.Account)
	if err != nil {
		return nil, err
	}
	in, err := json.Marshal(load.Spec{
		API: b.s.API, Key: b.s.APIKey, CA: b.s.CA, Model: model.Name,
		Socket: "/run/user/" + strings.TrimSpace(string(uid)) + "/resultity/engine/engine.sock",
		Ops:    ops, Busy: busy,
	})
	if err != nil {
		return nil, err
	}
	var raw bytes.Buffer
	if err := n.Exec(ctx, host.Cmd{Args: []string{loader}, Stdin: bytes.NewReader(in), Stdout: &raw}); err != nil {
		return nil, err
	}
	var out []load.Outcome
	return out, json.Unmarshal(raw.Bytes(), &out)
}

// pick takes one number out of each outcome at offset, step apart.
func pick(out []load.Outcome, offset, step int, f func(load.Outcome) float64) []float64 {
	var v []float64
	for i := offset; i < len(out); i += step {
		v = append(v, f(out[i]))
	}
	return v
}

func total(o load.Outcome) float64 { return o.Total }
func first(o load.Outcome) float64 { return o.First }
func token(o load.Outcome) float64 { return o.Token }
func rate(o load.Outcome) float64  { return float64(o.Requests) / o.Seconds }

// bothWays measures each op on both ways in turns, and adds rows: direct,
// through the network and the node, and the difference.
func (b *bench) bothWays(ctx context.Context, n *stack.Node, t *table, rounds int, floors []load.Op, all []series) (m measured, err error) {
	round := slices.Clone(floors)
	first := len(round)
	for _, s := range all {
		direct := s.op
		direct.Direct = true
		round = append(round, direct, s.op)
	}
	// What is opened and read at the first request is no part of any round.
	out, err := b.load(ctx, n, slices.Repeat(round, 1+rounds)...)
	if err != nil {
		return m, err
	}
	out = out[len(round):]
	for i, s := range all {
		for _, v := range s.values {
			direct := pick(out, first+2*i, len(round), v.f)
			path := pick(out, first+1+2*i, len(round), v.f)
			more := paired(path, direct, minus)
			m.added = append(m.added, more)
			t.add(v.name+", engine's socket", "µs", direct)
			t.add(v.name+", API", "µs", path)
			t.add(v.name+", added", "µs", more, v.goal...)
		}
	}
	m.out, m.step = out, len(round)
	return m, nil
}

// measured is what bothWays has seen, by round.
type measured struct {
	added [][]float64 // µs, to each value of each series, in their order
	out   []load.Outcome
	step  int // outcomes in a round
}

// floor is what the i-th floor took.
func (m *measured) floor(i int, f func(load.Outcome) float64) []float64 {
	return pick(m.out, i, m.step, f)
}

type series struct {
	op     load.Op
	values []value
}

type value struct {
	name string
	f    func(load.Outcome) float64
	goal []goal
}

// The first goals: a millisecond with all checks and durable records, and a
// tenth of it for each token after the first.
var (
	addedGoal = []goal{atMost(1000)}
	tokenGoal = []goal{atMost(100)}
)

func addedReal(ctx context.Context, b *bench, t *table) error {
	n, err := b.node(ctx)
	if err != nil {
		return err
	}
	p := model.Prompts()[0].User
	each := b.scale(15, 3)
	_, err = b.bothWays(ctx, n, t, b.scale(15, 3), nil, []series{
		{load.Op{Prompt: p, Tokens: 1, Requests: each, Concurrency: 1}, []value{{"plain, one token", total, addedGoal}}},
		{load.Op{Prompt: p, Tokens: 1, Requests: each, Concurrency: 1, Stream: true}, []value{{"stream, first token", first, addedGoal}, {"stream, whole", total, nil}}},
	})
	return err
}

func addedInstant(ctx context.Context, b *bench, t *table) error {
	n, err := b.instantNode(ctx)
	if err != nil {
		return err
	}
	const long = 500
	each := b.scale(25, 5)
	m, err := b.bothWays(ctx, n, t, b.scale(15, 3), []load.Op{
		{Floor: true, Requests: each, Concurrency: 1},
		{Hops: true, Requests: 1, Concurrency: 1},
		{Hops: true, Relays: 2, Requests: 1, Concurrency: 1},
	}, []series{
		{load.Op{Prompt: "x", Tokens: 1, Want: instant.Text(1), Requests: each, Concurrency: 1}, []value{{"plain, one token", total, addedGoal}}},
		{load.Op{Prompt: "x", Tokens: 1, Want: instant.Text(1), Requests: each, Concurrency: 1, Stream: true}, []value{{"stream, first token", first, addedGoal}}},
		{load.Op{Prompt: instant.Pace(2 * time.Millisecond), Tokens: 200, Stamped: true, Requests: 1, Concurrency: 1, Stream: true}, []value{{"token each 2 ms, its way", token, tokenGoal}}},
		{load.Op{Prompt: "x", Tokens: long, Want: instant.Text(long), Requests: 2, Concurrency: 1, Stream: true}, []value{{"token as fast as it goes, time for each", token, tokenGoal}}},
	})
	if err != nil {
		return err
	}
	t.add(fmt.Sprintf("floor of plain: %d durable write, %d signature, %d check of one", load.Syncs, load.Signs, load.Checks), "µs", m.floor(0, total))
	t.add("plain, added / floor", "ratio", paired(m.added[0], m.floor(0, total), over), atMost(3))
	hops := paired(m.floor(2, token), m.floor(1, token), minus)
	t.add("floor of a token each 2 ms: two programs that pass bytes on, over TLS", "µs", hops)
	t.add("token each 2 ms, added / floor", "ratio", paired(m.added[2], hops, over))
	return nil
}

func throughput(ctx context.Context, b *bench, t *table) error {
	n, err := b.instantNode(ctx)
	if err != nil {
		return err
	}
	rounds, jobs := b.scale(5, 2), b.scale(400, 40)
	at := []int{1, 4, slots}
	var ops []load.Op
	for range rounds {
		for _, c := range at {
			o := load.Op{Prompt: "x", Tokens: 1, Want: instant.Text(1), Requests: jobs, Concurrency: c}
			ops = append(ops, o)
			o.Direct = true
			ops = append(ops, o)
		}
	}
	programs, err := b.programs(ctx, n)
	if err != nil {
		return err
	}
	if _, err := b.load(ctx, n, ops[:2*len(at)]...); err != nil { // warm
		return err
	}
	out, err := b.load(ctx, n, ops...)
	if err != nil {
		return err
	}
	for i, c := range at {
		path, direct := pick(out, 2*i, 2*len(at), rate), pick(out, 2*i+1, 2*len(at), rate)
		t.add(fmt.Sprintf("API, %d at once", c), "jobs/s", path)
		t.add(fmt.Sprintf("engine's socket, %d at once", c), "requests/s", direct)
	}
	// What a job costs does not depend on who else uses the machine.
	used := map[string][]float64{}
	for range rounds {
		before := make([]float64, len(programs))
		for i, p := range programs {
			if before[i], err = p.cpu(); err != nil {
				return err
			}
		}
		if _, err := b.load(ctx, n, load.Op{Prompt: "x", Tokens: 1, Want: instant.Text(1), Requests: jobs, Concurrency: 4}); err != nil {
			return err
		}
		for i, p := range programs {
			after, err := p.cpu()
			if err != nil {
				return err
			}
			used[p.name] = append(used[p.name], (after-before[i])/float64(jobs)*1e6)
		}
	}
	for _, p := range programs {
		t.add("CPU time of a job, "+p.name, "µs", used[p.name])
	}
	return nil
}

// program is a running one.
type program struct {
	name string
	h    *host.Host
	pid  string
}

func (b *bench) programs(ctx context.Context, n *stack.Node) ([]program, error) {
	pid, err := n.Property(ctx, agent, "MainPID")
	if err != nil {
		return nil, err
	}
	ps := []program{{"agent", n.Host, pid}}
	for _, p := range []struct {
		name, comm string
		h          *host.Host
	}{{"bridge", "resultity-bridg", n.Host}, {"network", "resultity-netwo", b.s.Net}} {
		out, err := p.h.Output(ctx, "pgrep", "-o", "-x", p.comm)
		if err != nil {
			return nil, err
		}
		ps = append(ps, program{p.name, p.h, strings.TrimSpace(string(out))})
	}
	return ps, nil
}

// cpu returns the seconds that the program has used.
func (p program) cpu() (float64, error) {
	raw, err := p.h.ReadFile("/proc/" + p.pid + "/stat")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("stat of %s cannot be read", p.name)
	}
	user, err := strconv.ParseFloat(f[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100, err // USER_HZ
}

// resident returns what the program holds, in MB.
func (p program) resident() (rss, pss float64, err error) {
	raw, err := p.h.ReadFile("/proc/" + p.pid + "/smaps_rollup")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[0] != "Rss:" && f[0] != "Pss:" {
			continue
		}
		kib, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			return 0, 0, err
		}
		if f[0] == "Rss:" {
			rss = kib * 1024 / 1e6
		} else {
			pss = kib * 1024 / 1e6
		}
	}
	return rss, pss, nil
}

func ready(ctx context.Context, b *bench, t *table) error {
	n, err := b.node(ctx)
	if err != nil {
		return err
	}
	var took []float64
	for range b.scale(11, 3) {
		if err := n.UserCtl(ctx, "restart", agent); err != nil {
			return err
		}
		var at [2]float64
		for i, p := range []string{"ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic"} {
			v, err := n.Property(ctx, agent, p)
			if err != nil {
				return err
			}
			if at[i], err = strconv.ParseFloat(v, 64); err != nil {
				return err
			}
		}
		took = append(took, (at[1]-at[0])/1000)
	}
	t.add("agent, exec to READY=1", "ms", took, atMost(200))
	return n.WaitRoutable(ctx)
}

func memory(ctx context.Context, b *bench, t *table) error {
	n, err := b.instantNode(ctx)
	if err != nil {
		return err
	}
	// Both new, so that nothing that was measured before counts. The agent
	// starts the runtime.
	if err := errors.Join(n.UserCtl(ctx, "stop", agent), n.UserCtl(ctx, "stop", stack.Runtime), n.UserCtl(ctx, "start", agent)); err != nil {
		return err
	}
	if err := n.WaitRoutable(ctx); err != nil {
		return err
	}
	programs, err := b.programs(ctx, n)
	if err != nil {
		return err
	}
	at100 := map[string]float64{}
	done := 0
	for _, jobs := range []int{0, 100, b.scale(10_000, 500)} {
		if jobs > done {
			if _, err := b.load(ctx, n, load.Op{Prompt: "x", Tokens: 1, Want: instant.Text(1), Requests: jobs - done, Concurrency: 4}); err != nil {
				return err
			}
			done = jobs
		}
		for _, p := range programs {
			rss, pss, err := p.resident()
			if err != nil {
				return err
			}
			var size, growth []goal // the agent's alone
			if p.name == "agent" {
				size, growth = []goal{atMost(60)}, []goal{atMost(1.3)}
			}
			t.add(fmt.Sprintf("%s, Rss after %d jobs", p.name, jobs), "MB", []float64{rss}, size...)
			t.add(fmt.Sprintf("%s, Pss after %d jobs", p.name, jobs), "MB", []float64{pss})
			if jobs == 100 {
				at100[p.name] = rss
			} else if jobs > 100 {
				t.add(fmt.Sprintf("%s, Rss after %d / after 100 jobs", p.name, jobs), "ratio", []float64{rss / at100[p.name]}, growth...)
			}
		}
	}
	return nil
}

func streams(ctx context.Context, b *bench, t *table) error {
	n, err := b.instantNode(ctx)
	if err != nil {
		return err
	}
	const tokens = 100
	count := b.scale(2000, 50)
	out, err := b.tryLoad(ctx, n, 2, load.Op{
		Prompt: "x", Tokens: tokens, Want: instant.Text(tokens), Receipts: true, Stream: true, Requests: count, Concurrency: 8,
	})
	if err != nil {
		return err
	}
	if out[0].Wrong != "" {
		fmt.Fprintf(os.Stderr, "bench: the first wrong stream: %s\n", out[0].Wrong)
	}
	t.add(fmt.Sprintf("exact of %d streams of %d tokens", count, tokens), "%",
		pick(out, 0, 1, func(o load.Outcome) float64 { return 100 * float64(o.Exact) / float64(o.Requests) }), atLeast(100))
	t.add("streams", "1/s", pick(out, 0, 1, rate))
	return nil
}
