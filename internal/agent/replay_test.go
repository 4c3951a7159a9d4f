package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// written is an engine's answer as a node writes it.
func written(j runtime.Job, text string) (runtime.Result, error) {
	a := openai.NewAssembler(j.Request.Kind, j.ID, j.Model, j.Created, j.Request.Stream, j.Request.IncludeUsage, j.ResponseBytes)
	for _, e := range []string{
		fmt.Sprintf(`{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":%q},"finish_reason":"stop"}]}`, text),
		`{"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}`, "[DONE]",
	} {
		if _, err := a.Event([]byte(e)); err != nil {
			return runtime.Result{}, err
		}
	}
	body, usage, err := a.Finish()
	return runtime.Result{Body: body, Usage: usage}, err
}

// keeping has a party keep jobs for replay.
func (p *party) keeping(n int) {
	p.keepN = n
	p.openKept()
}

// done has a job done.
func (f *fixture) done(t *testing.T, j *wire.Job) *wire.Result {
	t.Helper()
	f.Message(j)
	<-f.engine.asked
	f.engine.answer <- struct{}{}
	r := f.party.result(t)
	if r.Code != "" {
		t.Fatalf("%s: %s", r.Code, r.Message)
	}
	f.Message(&wire.Ack{Jobs: []receipt.JobID{j.ID}})
	synctest.Wait()
	return r
}

// again runs a replay whose engine says something.
func (f *fixture) again(t *testing.T, q control.ReplayRequest, says string) (control.Replay, error) {
	t.Helper()
	f.engine.mu.Lock()
	f.engine.says = says
	f.engine.mu.Unlock()
	f.engine.answer <- struct{}{}
	v, err := f.Replay(t.Context(), q)
	synctest.Wait()
	for len(f.engine.answer) > 0 { // it was not asked
		<-f.engine.answer
	}
	for len(f.engine.asked) > 0 {
		<-f.engine.asked
	}
	return v, err
}

const oldAnswer, newAnswer = "SECRET answer", "SECRET reply"

// replaying runs a test with a node that serves s and keeps two jobs.
func replaying(t *testing.T, test func(t *testing.T, f *fixture, n *deploytest.Network, s *snapshot.Snapshot)) {
	t.Helper()
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(map[string]any{"network.chain_id": 31337})
		f.tuf.serve(s, nil)
		f.party.keeping(2)
		f.engine.says = oldAnswer
		close(f.link.up)
		stop := f.run()
		defer func() { stop() }()
		pass(untilSettled)
		f.serves(s)
		test(t, f, n, s)
		if strings.Contains(f.book.String(), "SECRET") {
			t.Errorf("text of an answer in the log:\n%s", f.book)
		}
	})
}

func TestReplay(t *testing.T) {
	replaying(t, func(t *testing.T, f *fixture, n *deploytest.Network, s *snapshot.Snapshot) {
		j := job(s)
		f.done(t, j)
		f.party.drop()
		q := control.ReplayRequest{Job: j.ID.String()}
		v, err := f.again(t, q, oldAnswer)
		if err != nil || v.Verdict != openai.Same || v.Job != q.Job || v.Network != "testnet" || v.PromptTokens != 5 || v.CompletionTokens != 2 {
			t.Errorf("%+v, %v", v, err)
		}
		v, err = f.again(t, q, newAnswer)
		if err != nil || v.Verdict != openai.Different || v.Difference.Part != openai.PartText || v.Difference.Offset != len("SECRET ") || v.Was != "" || v.Is != "" {
			t.Errorf("%+v, %v", v, err)
		}
		q.Show = true
		if v, err := f.again(t, q, newAnswer); err != nil || v.Was != oldAnswer || v.Is != newAnswer {
			t.Errorf("%+v, %v", v, err)
		}
		if f.book.count(journal.JobReplayed) != 3 {
			t.Errorf("not logged:\n%s", f.book)
		}
		// Nothing comes of it but that.
		pass(time.Minute)
		for len(f.link.sent) > 0 {
			switch m := (<-f.link.sent).(type) {
			case *wire.Heartbeat:
				if m.Busy != 0 {
					t.Error("the network hears of a busy slot")
				}
			default:
				t.Errorf("the network hears %T", m)
			}
		}
		if e := f.worker.Ended(); e.Done != 1 {
			t.Errorf("counted: %+v", e)
		}
		jobs, err := f.Jobs(10)
		if err != nil || len(jobs) != 1 || jobs[0].State != "kept" || jobs[0].ID != q.Job {
			t.Errorf("%+v, %v", jobs, err)
		}
	})
}

// Who has the request, the response and the receipt need not be this node, but
// what he has has to belong together.
func TestReplayOfFiles(t *testing.T) {
	replaying(t, func(t *testing.T, f *fixture, n *deploytest.Network, s *snapshot.Snapshot) {
		j := job(s)
		j.Request = []byte(`{"model":"tiny-chat","temperature":0,"messages":[{"role":"user","content":"hi"}]}`)
		r := f.done(t, j)
		signed, err := json.Marshal(r.Receipt)
		if err != nil {
			t.Fatal(err)
		}
		whole := control.ReplayRequest{Request: j.Request, Response: r.Response, Receipt: signed}
		if v, err := f.again(t, whole, oldAnswer); err != nil || v.Verdict != openai.Same || v.Job != j.ID.String() {
			t.Errorf("%+v, %v", v, err)
		}
		if v, err := f.again(t, whole, newAnswer); err != nil || v.Verdict != openai.Different {
			t.Errorf("%+v, %v", v, err)
		}
		for name, change := range map[string]func(q *control.ReplayRequest){
			"another request":  func(q *control.ReplayRequest) { q.Request = append([]byte(" "), q.Request...) },
			"another response": func(q *control.ReplayRequest) { q.Response = append([]byte(" "), q.Response...) },
			"a changed receipt": func(q *control.ReplayRequest) {
				q.Receipt = []byte(strings.Replace(string(q.Receipt), `"completionTokens":"2"`, `"completionTokens":"3"`, 1))
			},
			"nothing":         func(q *control.ReplayRequest) { *q = control.ReplayRequest{} },
			"another network": func(q *control.ReplayRequest) { q.Network = "mainnet" },
		} {
			q := whole
			change(&q)
			if v, err := f.again(t, q, oldAnswer); !errors.Is(err, control.ErrRefused) {
				t.Errorf("%s: %+v, %v", name, v, err)
			}
		}
		// A receipt that a liar has signed over what is no answer.
		rc := r.Receipt.Receipt()
		rc.Measured.ResponseHash = digest.Of([]byte("SECRET"))
		lie, err := rc.Sign(r.Receipt.ChainID(), nodeKey)
		if err != nil {
			t.Fatal(err)
		}
		q := whole
		q.Response = []byte("SECRET")
		if q.Receipt, err = json.Marshal(lie); err != nil {
			t.Fatal(err)
		}
		if v, err := f.again(t, q, oldAnswer); !errors.Is(err, control.ErrRefused) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%+v, %v", v, err)
		}
	})
}

// What may rightly be different is not called so.
func TestReplayNotComparable(t *testing.T) {
	replaying(t, func(t *testing.T, f *fixture, n *deploytest.Network, s *snapshot.Snapshot) {
		j := job(s) // nobody gives a seed, and the temperature is not 0
		r := f.done(t, j)
		signed, err := json.Marshal(r.Receipt)
		if err != nil {
			t.Fatal(err)
		}
		incomparable := func(q control.ReplayRequest, why string) {
			t.Helper()
			v, err := f.again(t, q, newAnswer)
			if err != nil || v.Verdict != openai.NotComparable || !strings.Contains(v.Reason, why) {
				t.Errorf("%+v, %v, want one that names %s", v, err, why)
			}
		}
		incomparable(control.ReplayRequest{Request: j.Request, Response: r.Response, Receipt: signed}, "seed")
		// The model that an answer names may be any words, with a receipt by anybody.
		words := strings.Replace(string(r.Response), `"model":"`+j.Model+`"`, `"model":"SECRET words"`, 1)
		rc := r.Receipt.Receipt()
		rc.Measured.ResponseHash = digest.Of([]byte(words))
		lie, err := rc.Sign(r.Receipt.ChainID(), nodeKey)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(lie)
		if err != nil {
			t.Fatal(err)
		}
		incomparable(control.ReplayRequest{Request: j.Request, Response: []byte(words), Receipt: raw}, "SECRET words")
		kept := control.ReplayRequest{Job: j.ID.String()}
		if v, err := f.again(t, kept, oldAnswer); err != nil || v.Verdict != openai.Same { // its seed is known here
			t.Errorf("%+v, %v", v, err)
		}
		for what, change := range map[string]func(r *receipt.Receipt){
			"class": func(r *receipt.Receipt) { r.Claimed.ClassDigest = digest.Of([]byte("other")) },
			"image": func(r *receipt.Receipt) { r.Measured.ImageDigest = digest.Of([]byte("other")) },
			"model": func(r *receipt.Receipt) { r.Measured.ModelDigest = digest.Of([]byte("other")) },
		} {
			other := r.Receipt.Receipt()
			change(&other)
			signed, err := other.Sign(r.Receipt.ChainID(), nodeKey)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := json.Marshal(signed)
			if err != nil {
				t.Fatal(err)
			}
			incomparable(control.ReplayRequest{Request: j.Request, Response: r.Response, Receipt: raw}, what)
		}
	})
}

func TestReplayRefused(t *testing.T) {
	replaying(t, func(t *testing.T, f *fixture, n *deploytest.Network, s *snapshot.Snapshot) {
		refused := func(q control.ReplayRequest, why string) {
			t.Helper()
			if v, err := f.again(t, q, oldAnswer); !errors.Is(err, control.ErrRefused) || !strings.Contains(err.Error(), why) {
				t.Errorf("%+v, %v, want one that says %s", v, err, why)
			}
		}
		var jobs []*wire.Job
		for range 3 {
			j := job(s)
			f.done(t, j)
			jobs = append(jobs, j)
		}
		refused(control.ReplayRequest{Job: jobs[0].ID.String()}, "replay.keep") // two are kept
		refused(control.ReplayRequest{Job: "x"}, "32 lower-case")
		running := job(s)
		f.Message(running)
		<-f.engine.asked
		if _, err := f.Replay(t.Context(), control.ReplayRequest{Job: running.ID.String()}); !errors.Is(err, control.ErrRefused) || !strings.Contains(err.Error(), "still running") {
			t.Errorf("%v", err)
		}
		f.engine.answer <- struct{}{}
		synctest.Wait()
		// Nobody waits for ever.
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, control.ErrRefused)
		defer cancel()
		if _, err := f.Replay(ctx, control.ReplayRequest{Job: jobs[2].ID.String()}); !errors.Is(err, control.ErrRefused) {
			t.Errorf("%v", err)
		}
		<-f.engine.asked
		f.door.shut(f.worker)
		refused(control.ReplayRequest{Job: jobs[2].ID.String()}, "no runtime is active")
		// Set back to none, nothing is left.
		f.party.keeping(0)
		refused(control.ReplayRequest{Job: jobs[2].ID.String()}, "(it is 0)")
		if _, err := os.Lstat(filepath.Join(f.party.dir, "replay")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is there: %v", err)
		}
	})
}

// A network that the node has left keeps nothing on its disk.
func TestForgetKept(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	f.cfg.Replay.Keep = 1
	f.forgetKept() // there is nothing
	left := filepath.Join(f.cfg.Paths.State, "networks", "left")
	for _, dir := range []string{filepath.Join(left, keptDir), filepath.Join(left, "jobs"), filepath.Join(f.party.dir, keptDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte("SECRET"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.forgetKept()
	if _, err := os.Lstat(filepath.Join(left, keptDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
	for _, dir := range []string{filepath.Join(left, "jobs"), filepath.Join(f.party.dir, keptDir)} {
		if _, err := os.Lstat(filepath.Join(dir, "x")); err != nil {
			t.Error(err)
		}
	}
	f.cfg.Replay.Keep = 0 // also of a network that cannot be opened
	f.forgetKept()
	if _, err := os.Lstat(filepath.Join(f.party.dir, keptDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none are to be kept, and it is there: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
