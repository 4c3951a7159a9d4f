package network_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// class is the determinism class of a name.
func class(name string) *wire.Class {
	return &wire.Class{Digest: digest.Of([]byte(name)), Hardware: determinism.Hardware{Arch: "amd64", CPU: name, Features: []string{}, GPUs: []string{}}}
}

// ready is a node of a class that may get jobs.
func (n *testNetwork) ready(name string) *nodetest.Session {
	n.t.Helper()
	v := n.node()
	v.Class = class(name)
	return v.Ready(n.t)
}

// keeping is a network that keeps requests.
func keeping(t *testing.T, bytes int64) *testNetwork {
	n := setUp(t, func(*snapshot.Config) {})
	n.tweak = func(c *network.Config) { c.KeepRequestsBytes = bytes }
	n.serve()
	return n
}

// said checks that the log of a network that has ended has an event for each of these
// reasons, and that the catalog explains them.
func (n *testNetwork) said(e *journal.Event, reasons ...string) {
	n.t.Helper()
	for _, r := range reasons {
		if !regexp.MustCompile("event=" + e.Name + "\\b.* reason=" + r + "\\b").MatchString(n.logs.w.String()) {
			n.t.Errorf("the log does not have %s for %s", e.Name, r)
		}
		if !regexp.MustCompile(" " + r + "( \\(|\\.)").MatchString(e.Text) {
			n.t.Errorf("the catalog does not explain %s", r)
		}
	}
}

type ran struct {
	code int
	out  string
}

// replay runs the command in the background.
func (n *testNetwork) replay(args ...string) <-chan ran {
	done := make(chan ran, 1)
	go func() {
		code, out := n.run(append([]string{"jobs", "replay"}, args...)...)
		done <- ran{code, out}
	}()
	return done
}

func (r ran) verdict(t *testing.T, code int) *network.Replay {
	t.Helper()
	v := new(network.Replay)
	// An error's text is behind the object.
	if err := json.NewDecoder(strings.NewReader(r.out)).Decode(v); err != nil || r.code != code {
		t.Fatalf("%d (want %d), %v: %s", r.code, code, err, r.out)
	}
	return v
}

const chatSeeded = `{"model":"tiny","temperature":0,"messages":[{"role":"user","content":"secret words"}]}`

// A liar is found by a second node of its class, and both have signed what they
// said. A node of another class is never asked.
func TestReplayFindsALiar(t *testing.T) {
	n := keeping(t, 1<<20)
	liar := n.ready("a")
	ch := n.ask(chatSeeded)
	lied := liar.Take()
	liar.Finish(lied, "secret lie")
	if r := n.answer(ch); r.status != 200 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	other := n.ready("b")
	id := lied.ID.String()
	// Nobody else is there who could say.
	if r := <-n.replay(id); r.code != 1 || !strings.Contains(r.out, "no other node of class") {
		t.Fatalf("%+v", r)
	}
	if r := <-n.replay(id, "--node", other.Node.Key.Address().Hex()); r.code != 1 || !strings.Contains(r.out, "is not of class") {
		t.Fatalf("%+v", r)
	}
	honest := n.ready("a")
	done := n.replay(id, "--json")
	j := honest.Take()
	if j.ID == lied.ID || string(j.Request) != chatSeeded || j.Seed != lied.Seed || j.Kind != lied.Kind || j.Model != lied.Model {
		t.Errorf("the second node was given %+v", j)
	}
	honest.Finish(j, "secret truth")
	v := (<-done).verdict(t, 2)
	if v.Difference == nil || v.Difference.Part != "text" || v.Difference.Offset != len("secret ") {
		t.Errorf("%+v", v.Comparison)
	}
	t.Logf("expected: text differs behind character %d; got: %+v", len("secret "), v.Difference)
	a, b := v.First.Receipt(), v.Second.Receipt()
	if a.Node != liar.Node.Key.Address() || b.Node != honest.Node.Key.Address() || a.Job != lied.ID || b.Job != j.ID || v.Replay != j.ID {
		t.Errorf("signed by %+v and %+v", a, b)
	}
	if a.Measured.ResponseHash != digest.Of(nodetest.Body(lied, "secret lie")) || b.Measured.ResponseHash != digest.Of(nodetest.Body(j, "secret truth")) {
		t.Error("the receipts are not about what was said")
	}
	// Asked once more, the liar tells its lie again, which is no proof of anything.
	done = n.replay(id, "--json", "--node", liar.Node.Key.Address().Hex())
	liar.Finish(liar.Take(), "secret lie")
	(<-done).verdict(t, 0)
	// It is written down, over restarts, with both receipts and without text.
	for _, s := range []*nodetest.Session{liar, other, honest} {
		s.Drop()
	}
	n.stop()
	for _, serving := range []bool{false, true} {
		if serving {
			n.serve()
		}
		code, out := n.run("jobs", "replays", "--json")
		var list []network.Replay
		if err := json.Unmarshal([]byte(out), &list); code != 0 || err != nil || len(list) != 2 || list[0].Replay != v.Replay || list[0].Difference == nil || list[1].Verdict != "same" {
			t.Fatalf("%d, %v: %s", code, err, out)
		}
		if strings.Contains(out, "secret") {
			t.Errorf("text of an answer: %s", out)
		}
		if list[0].Second == nil || list[0].Second.Receipt() != b {
			t.Error("the receipt is another one")
		}
	}
	if code, out := n.run("jobs", "replays"); code != 0 || !strings.Contains(out, "DIFFERENT") || !strings.Contains(out, "behind character 7") {
		t.Errorf("%d: %s", code, out)
	}
}

// A node cannot end a comparison by signing for another class than it had named: that
// is a finding against it, and others are asked, as long as there are any.
func TestReplayWithHostileNodes(t *testing.T) {
	n := keeping(t, 1<<20)
	another := func(r *receipt.Receipt) { r.Claimed.ClassDigest = digest.Of([]byte("of its own")) }
	sign := func(s *nodetest.Session, text string, change func(*receipt.Receipt)) *wire.Job {
		j := s.Take()
		s.Send(s.Node.Result(t, j, nodetest.Body(j, text), change))
		nodetest.Expect[*wire.Ack](s)
		return j
	}
	liar := n.ready("a")
	ch := n.ask(chatSeeded)
	lied := sign(liar, "secret lie", another)
	n.answer(ch)
	id := lied.ID.String()
	n.until("it is counted", func() bool { return n.metric("resultity_receipts_of_another_class_total") == 1 })
	// Nobody is there yet; what it has signed is on record all the same.
	v := (<-n.replay(id, "--json")).verdict(t, 3)
	if len(v.Findings) != 1 || v.Findings[0].Node != liar.Node.Key.Address() || v.Findings[0].Receipt == nil || v.Class != class("a").Digest {
		t.Errorf("%+v", v)
	}
	honest := n.ready("a")
	done := n.replay(id, "--json")
	sign(honest, "secret truth", nil)
	v = (<-done).verdict(t, 2) // by the class for which it was given the job
	if len(v.Findings) != 1 || v.Difference == nil || !v.SameAccount {
		t.Errorf("%+v", v)
	}
	// Now others are asked about an honest answer, and want to be compared with nobody.
	liar.Drop()
	n.until("it is gone", func() bool { return n.metric(`resultity_nodes{state="routable"}`) == 1 })
	ch = n.ask(chatSeeded)
	told := sign(honest, "secret truth", nil)
	n.answer(ch)
	id = told.ID.String()
	hostile := []*nodetest.Session{n.ready("a"), n.ready("a")}
	third := n.ready("a")
	// The least busy is asked first, among equals who had nothing for the longest time.
	done = n.replay(id, "--node", third.Node.Key.Address().Hex())
	sign(third, "secret truth", nil)
	if r := <-done; r.code != 0 {
		t.Fatalf("%+v", r)
	}
	done = n.replay(id, "--json")
	answers := make(chan struct{}, len(hostile))
	for _, h := range hostile {
		go func() {
			defer func() { answers <- struct{}{} }()
			sign(h, "secret lie", another)
		}()
	}
	<-answers
	<-answers
	sign(third, "secret truth", nil)
	v = (<-done).verdict(t, 0)
	if len(v.Findings) != 2 || v.Second == nil || v.Second.Receipt().Node != third.Node.Key.Address() {
		t.Errorf("%+v", v)
	}
	for _, f := range v.Findings {
		if f.Node == third.Node.Key.Address() || f.Receipt == nil || f.Receipt.Receipt().Node != f.Node || !strings.Contains(f.Text, "signed for class") {
			t.Errorf("%+v", f)
		}
	}
	// With hostile ones alone it ends, without a verdict but with findings.
	third.Drop()
	n.until("it is gone", func() bool { return n.metric(`resultity_nodes{state="routable"}`) == 3 })
	done = n.replay(id)
	for _, h := range hostile {
		go func() {
			defer func() { answers <- struct{}{} }()
			sign(h, "secret lie", another)
		}()
	}
	<-answers
	<-answers
	if r := <-done; r.code != 3 || strings.Count(r.out, "finding") != 2 || strings.Contains(r.out, "secret") {
		t.Errorf("%+v", r)
	}
	if code, out := n.run("jobs", "replays"); code != 0 || strings.Count(out, "signed for class") != 6 || !strings.Contains(out, "both of one account") {
		t.Errorf("%d: %s", code, out)
	}
	// Of more than may be asked, so many are.
	for len(hostile) <= network.MaxAsked {
		hostile = append(hostile, n.ready("a"))
	}
	var ends sync.WaitGroup
	asked := make(chan evm.Address, len(hostile))
	done = n.replay(id)
	for _, h := range hostile {
		ends.Go(func() {
			for {
				m, err := h.Receive()
				if err != nil {
					return
				}
				if j, ok := m.(*wire.Job); ok {
					asked <- h.Node.Key.Address()
					h.Send(&wire.Accept{Job: j.ID})
					h.Send(h.Node.Result(t, j, nodetest.Body(j, "secret lie"), another))
				}
			}
		})
	}
	r := <-done
	t.Logf("%d hostile nodes: expected: %d are asked; got: %d", len(hostile), network.MaxAsked, len(asked))
	if r.code != 3 || strings.Count(r.out, "finding") != network.MaxAsked || len(asked) != network.MaxAsked {
		t.Errorf("%d of %d were asked: %+v", len(asked), len(hostile), r)
	}
	for _, s := range append(hostile, honest) {
		s.Drop()
	}
	ends.Wait()
	n.stop()
	for _, e := range []*journal.Event{journal.NodeClassContradicted, journal.ReplayUndecided, journal.AnswersDiffer} {
		if !strings.Contains(n.logs.w.String(), "event="+e.Name) {
			t.Errorf("the log does not have %s", e.Name)
		}
	}
}

// Nobody is billed for a replay, and no client gets it.
func TestReplayIsNobodysJob(t *testing.T) {
	n := keeping(t, 1<<20)
	first := n.ready("a")
	ch := n.ask(chatSeeded)
	j := first.Take()
	first.Finish(j, "secret answer")
	n.answer(ch)
	n.until("the job is counted", func() bool { return n.metric(`resultity_jobs_total{outcome="ok"}`) == 1 })
	second := n.ready("a")
	done := n.replay(j.ID.String())
	again := second.Take()
	second.Finish(again, "secret answer")
	r := <-done
	if r.code != 0 || !strings.HasPrefix(r.out, "SAME") || !strings.Contains(r.out, first.Node.Key.Address().Hex()) || !strings.Contains(r.out, second.Node.Key.Address().Hex()) {
		t.Fatalf("%+v", r)
	}
	if got := n.metric(`resultity_jobs_total{outcome="ok"}`); got != 1 {
		t.Errorf("%v jobs are counted", got)
	}
	if got := n.metric(`resultity_replays_total{verdict="same"}`); got != 1 {
		t.Errorf("%v replays are counted", got)
	}
	// A replay of a replay makes no sense: its request is not kept.
	if r := <-n.replay(again.ID.String()); r.code != 1 || !strings.Contains(r.out, "is not kept") {
		t.Errorf("%+v", r)
	}
	// It goes to no other node, also where the one that was chosen is gone.
	done = n.replay(j.ID.String(), "--node", second.Node.Key.Address().Hex())
	second.Take()
	second.Drop()
	first.Send(first.Node.Heartbeat())
	if r := <-done; r.code != 1 || !strings.Contains(r.out, "did not answer") {
		t.Errorf("%+v", r)
	}
	if r := <-n.replay(j.ID.String(), "--node", second.Node.Key.Address().Hex()); r.code != 1 || !strings.Contains(r.out, "is not connected") {
		t.Errorf("%+v", r)
	}
	first.Drop()
	n.stop()
	n.said(journal.NetworkReplayRefused, "not_kept", "unanswered", "no_node")
}

// Without requests on disk the client's own serves, if it is the right one.
func TestReplayWithTheClientsRequest(t *testing.T) {
	n := start(t, nil)
	first := n.ready("a")
	jobs := map[string]*wire.Job{}
	for _, body := range []string{chatSeeded, chat} {
		ch := n.ask(body)
		j := first.Take()
		first.Finish(j, "secret answer")
		n.answer(ch)
		jobs[body] = j
	}
	write := func(text string) string {
		name := filepath.Join(t.TempDir(), "request")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	id := jobs[chatSeeded].ID.String()
	if r := <-n.replay(id); r.code != 1 || !strings.Contains(r.out, "keep_requests_bytes of network.toml is 0") {
		t.Errorf("%+v", r)
	}
	if r := <-n.replay(id, "--request", write(chat)); r.code != 1 || !strings.Contains(r.out, "not the request of job") {
		t.Errorf("%+v", r)
	}
	if r := <-n.replay(receipt.NewJobID().String(), "--request", write(chat)); r.code != 1 || !strings.Contains(r.out, "has no result here") {
		t.Errorf("%+v", r)
	}
	// Its tokens were drawn with a seed of the network's, which nobody knows any more.
	if r := <-n.replay(jobs[chat].ID.String(), "--request", write(chat)); r.code != 3 || !strings.Contains(r.out, "NOT COMPARABLE") || !strings.Contains(r.out, "seed") {
		t.Errorf("%+v", r)
	}
	for _, args := range [][]string{{}, {"x"}, {id, "--node", "x"}, {id, id}} {
		if r := <-n.replay(args...); r.code != 64 {
			t.Errorf("%q: %+v", args, r)
		}
	}
	second := n.ready("a")
	done := n.replay(id, "--request", write(chatSeeded))
	second.Finish(second.Take(), "secret answer")
	if r := <-done; r.code != 0 {
		t.Errorf("%+v", r)
	}
	// What the second node signs for another class, or claims to have counted, shows.
	done = n.replay(id, "--request", write(chatSeeded), "--node", second.Node.Key.Address().Hex())
	j := second.Take()
	second.Send(second.Node.Result(t, j, nodetest.Body(j, "secret answer"), func(r *receipt.Receipt) { r.Claimed.ClassDigest = digest.Of([]byte("c")) }))
	if r := <-done; r.code != 3 || !strings.Contains(r.out, "in another class") {
		t.Errorf("%+v", r)
	}
	nodetest.Expect[*wire.Ack](second)
	done = n.replay(id, "--request", write(chatSeeded), "--node", second.Node.Key.Address().Hex())
	j = second.Take()
	second.Send(second.Node.Result(t, j, nodetest.Body(j, "secret answer"), func(r *receipt.Receipt) { r.Claimed.CompletionTokens = 4 }))
	if r := <-done; r.code != 2 || !strings.Contains(r.out, "completion_tokens: it was 3 and is 4") {
		t.Errorf("%+v", r)
	}
	// A service that does not run gives out nothing.
	nodetest.Expect[*wire.Ack](second)
	first.Drop()
	second.Drop()
	n.stop()
	if r := <-n.replay(id); r.code != 78 || !strings.Contains(r.out, "start it") {
		t.Errorf("%+v", r)
	}
	n.said(journal.NetworkReplayRefused, "not_kept", "request", "no_result")
	n.said(journal.ReplayUndecided, "seed", "class")
}

// Requests go when the operator wants none kept any more.
func TestKeptRequestsGo(t *testing.T) {
	n := keeping(t, 1<<20)
	first := n.ready("a")
	ch := n.ask(chatSeeded)
	j := first.Take()
	first.Finish(j, "secret answer")
	n.answer(ch)
	first.Drop()
	n.stop()
	n.tweak = nil
	n.serve()
	if r := <-n.replay(j.ID.String()); r.code != 1 || !strings.Contains(r.out, "is not kept") {
		t.Errorf("%+v", r)
	}
	n.stop()
	n.tweak = func(c *network.Config) { c.KeepRequestsBytes = 1 << 20 }
	n.serve()
	if r := <-n.replay(j.ID.String()); r.code != 1 || !strings.Contains(r.out, "is not kept") {
		t.Errorf("%+v", r)
	}
}
