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

// said checks that the journal has the reason for which the last replay came to
// nothing, in a word that the catalog explains.
func (f *fixture) said(t *testing.T, code control.ReplayCode, job string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(f.book.String()), "\n")
	line := lines[len(lines)-1]
	if !strings.Contains(line, "event=replay-refused") || !strings.HasSuffix(line, "code="+string(code)) || strings.Contains(line, "job="+job) != (job != "") {
		t.Errorf("%s: the journal says %s", code, line)
	}
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
		for _, c := range []struct {
			name, job string
			code      control.ReplayCode
			change    func(q *control.ReplayRequest)
		}{
			{"another request", j.ID.String(), control.ReplayRequested, func(q *control.ReplayRequest) { q.Request = append([]byte(" "), q.Request...) }},
			{"another response", j.ID.String(), control.ReplayResponse, func(q *control.ReplayRequest) { q.Response = append([]byte(" "), q.Response...) }},
			{"a changed receipt", "", control.ReplayReceipt, func(q *control.ReplayRequest) {
				q.Receipt = []byte(strings.Replace(string(q.Receipt), `"completionTokens":"2"`, `"completionTokens":"3"`, 1))
			}},
			{"nothing", "", control.ReplayReceipt, func(q *control.ReplayRequest) { *q = control.ReplayRequest{} }},
			{"another network", "", control.ReplayNetwork, func(q *control.ReplayRequest) { q.Network = "mainnet" }},
			{"another chain", j.ID.String(), control.ReplayChain, func(q *control.ReplayRequest) {
				rc := r.Receipt.Receipt()
				other, err := rc.Sign(r.Receipt.ChainID()+1, nodeKey)
				if err != nil {
					t.Fatal(err)
				}
				if q.Receipt, err = json.Marshal(other); err != nil {
					t.Fatal(err)
				}
			}},
		} {
			q := whole
			c.change(&q)
			if v, err := f.again(t, q, oldAnswer); !errors.Is(err, control.ErrRefused) {
				t.Errorf("%s: %+v, %v", c.name, v, err)
			}
			f.said(t, c.code, c.job)
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
		f.said(t, control.ReplayResponse, j.ID.String())
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
		incomparable := func(q control.ReplayRequest, why string, cause openai.Cause) {
			t.Helper()
			v, err := f.again(t, q, newAnswer)
			if err != nil || v.Verdict != openai.NotComparable || v.Cause != cause || !strings.Contains(v.Reason, why) {
				t.Errorf("%+v, %v, want one that names %s", v, err, why)
			}
			if !strings.HasSuffix(f.book.String(), " code="+string(cause)+"\n") || !strings.Contains(journal.JobReplayed.Text, " "+string(cause)+" (") {
				t.Errorf("not said, or not explained: %s", cause)
			}
		}
		incomparable(control.ReplayRequest{Request: j.Request, Response: r.Response, Receipt: signed}, "seed", openai.NoSeed)
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
		incomparable(control.ReplayRequest{Request: j.Request, Response: []byte(words), Receipt: raw}, "SECRET words", openai.OtherModel)
		kept := control.ReplayRequest{Job: j.ID.String()}
		if v, err := f.again(t, kept, oldAnswer); err != nil || v.Verdict != openai.Same { // its seed is known here
			t.Errorf("%+v, %v", v, err)
		}
		for what, change := range map[openai.Cause]func(r *receipt.Receipt){
			openai.OtherClass: func(r *receipt.Receipt) { r.Claimed.ClassDigest = digest.Of([]byte("other")) },
			openai.OtherImage: func(r *receipt.Receipt) { r.Measured.ImageDigest = digest.Of([]byte("other")) },
			openai.OtherModel: func(r *receipt.Receipt) { r.Measured.ModelDigest = digest.Of([]byte("other")) },
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
			incomparable(control.ReplayRequest{Request: j.Request, Response: r.Response, Receipt: raw}, string(what), what)
		}
	})
}

func TestReplayRefused(t *testing.T) {
	replaying(t, func(t *testing.T, f *fixture, n *deploytest.Network, s *snapshot.Snapshot) {
		refused := func(q control.ReplayRequest, why string, code control.ReplayCode) {
			t.Helper()
			defer func() {
				job := q.Job
				if code == control.ReplayMalformed {
					job = ""
				}
				f.said(t, code, job)
			}()
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
		refused(control.ReplayRequest{Job: jobs[0].ID.String()}, "replay.keep", control.ReplayNotKept) // two are kept
		refused(control.ReplayRequest{Job: "SECRET"}, "32 lower-case", control.ReplayMalformed)
		running := job(s)
		f.Message(running)
		<-f.engine.asked
		if _, err := f.Replay(t.Context(), control.ReplayRequest{Job: running.ID.String()}); !errors.Is(err, control.ErrRefused) || !strings.Contains(err.Error(), "still running") {
			t.Errorf("%v", err)
		}
		f.said(t, control.ReplayRunning, running.ID.String())
		f.engine.answer <- struct{}{}
		synctest.Wait()
		// Nobody waits for ever.
		last := jobs[2].ID.String()
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, control.RefuseReplay(control.ReplayTimeout, "time is up"))
		defer cancel()
		if _, err := f.Replay(ctx, control.ReplayRequest{Job: last}); !errors.Is(err, control.ErrRefused) {
			t.Errorf("%v", err)
		}
		f.said(t, control.ReplayTimeout, last)
		<-f.engine.asked
		ctx, hangUp := context.WithCancel(t.Context())
		go func() {
			<-f.engine.asked
			hangUp()
		}()
		if _, err := f.Replay(ctx, control.ReplayRequest{Job: last}); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		f.said(t, control.ReplayCancelled, last)
		f.engine.mu.Lock()
		f.engine.fails = errors.New("SECRET")
		f.engine.mu.Unlock()
		if v, err := f.again(t, control.ReplayRequest{Job: last}, oldAnswer); err == nil || errors.Is(err, control.ErrRefused) {
			t.Errorf("%+v, %v", v, err)
		}
		f.said(t, control.ReplayEngine, last)
		f.engine.mu.Lock()
		f.engine.fails = nil
		f.engine.mu.Unlock()
		// What was kept is not what it was.
		files, err := filepath.Glob(filepath.Join(f.party.dir, keptDir, "*"+running.ID.String()+"*"))
		if err != nil || len(files) != 1 {
			t.Fatal(files, err)
		}
		if err := os.WriteFile(files[0], []byte("SECRET"), 0o600); err != nil {
			t.Fatal(err)
		}
		if v, err := f.again(t, control.ReplayRequest{Job: running.ID.String()}, oldAnswer); err == nil || errors.Is(err, control.ErrRefused) {
			t.Errorf("%+v, %v", v, err)
		}
		f.said(t, control.ReplayStorage, running.ID.String())
		// The control socket has reasons of its own.
		for _, code := range []control.ReplayCode{control.ReplayBusy, control.ReplayMalformed} {
			f.NotReplayed(control.RefuseReplay(code, "SECRET"))
			f.said(t, code, "")
		}
		f.door.shut(f.worker)
		refused(control.ReplayRequest{Job: last}, "no runtime is active", control.ReplayNoRuntime)
		// Set back to none, nothing is left.
		f.party.keeping(0)
		refused(control.ReplayRequest{Job: last}, "(it is 0)", control.ReplayNotKept)
		if _, err := os.Lstat(filepath.Join(f.party.dir, "replay")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is there: %v", err)
		}
	})
}

// Each reason has its words in the catalog.
func TestReplayCodesAreExplained(t *testing.T) {
	for _, code := range control.ReplayCodes {
		if !strings.Contains(journal.ReplayRefused.Text, " "+string(code)+" (") {
			t.Errorf("the catalog does not explain %s", code)
		}
	}
	for _, r := range reasonCodes {
		if !strings.Contains(journal.OrderFailed.Text, " "+r.code+" (") {
			t.Errorf("the catalog does not explain %s", r.code)
		}
	}
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
