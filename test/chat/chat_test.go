package chat

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
)

// network is one that answers everything in one way, in memory.
type network struct {
	t   *testing.T
	key *evm.Key

	status  int
	answer  string          // its body
	breaks  bool            // the body ends with an error
	another bool            // receipts are for another request
	same    receipt.JobID   // if set, the receipt of every answer
	late    time.Duration   // until there is a receipt
	mu      sync.Mutex      // guards what follows
	signed  map[string]sign // by receipt
}

type sign struct {
	receipt.Receipt
	at time.Time
}

const (
	plain    = `{"choices":[{"message":{"content":"yes"}}]}`
	streamed = "data: {\"choices\":[{\"delta\":{\"content\":\"y\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"es\"}}]}\n\ndata: {\"choices\":[]}\n\n"
)

func newNetwork(t *testing.T) *network {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return &network{t: t, key: key, status: http.StatusOK, answer: plain, signed: map[string]sign{}}
}

func (n *network) client() *Client {
	return &Client{API: "https://net", HTTP: &http.Client{Transport: n}}
}

// RoundTrip implements [http.RoundTripper].
func (n *network) RoundTrip(req *http.Request) (*http.Response, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := httptest.NewRecorder()
	if req.Method == http.MethodPost {
		raw, err := io.ReadAll(req.Body)
		if err != nil {
			return nil, err
		}
		id := n.same
		if id == (receipt.JobID{}) {
			id = receipt.NewJobID()
		}
		if n.another {
			raw = append(raw, ' ')
		}
		d := receipt.Unknown
		r := receipt.Receipt{
			Job: id, Node: n.key.Address(), Claimed: receipt.Claimed{ClassDigest: d}, Sequence: 1,
			Measured: receipt.Measured{ConfigDigest: d, ImageDigest: d, ModelDigest: d, SandboxDigest: d, RequestHash: digest.Of(raw), ResponseHash: digest.Of([]byte(n.answer))},
		}
		n.signed[id.String()] = sign{r, time.Now()}
		w.Header().Set("Resultity-Receipt", id.String())
		w.Header().Set("Retry-After", "3")
		w.WriteHeader(n.status)
		w.WriteString(n.answer)
		res := w.Result()
		if n.breaks {
			res.Body = io.NopCloser(io.MultiReader(res.Body, broken{}))
		}
		return res, nil
	}
	id := strings.TrimPrefix(req.URL.Path, "/v1/receipts/")
	if s, ok := n.signed[id]; ok && time.Since(s.at) >= n.late {
		signed, err := s.Sign(1, n.key)
		if err != nil {
			return nil, err
		}
		raw, err := json.Marshal(signed)
		if err != nil {
			return nil, err
		}
		w.Write(raw)
	} else {
		w.WriteHeader(http.StatusNotFound)
	}
	return w.Result(), nil
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestAsk(t *testing.T) {
	for name, c := range map[string]struct {
		is     func(*network)
		stream bool
		want   error // nil for an answer
		late   bool
	}{
		"plain":                    {is: func(*network) {}},
		"streamed":                 {is: func(n *network) { n.answer = streamed + "data: [DONE]\n\n" }, stream: true},
		"stream without its end":   {is: func(n *network) { n.answer = streamed }, stream: true, want: ErrBroken},
		"connection ends":          {is: func(n *network) { n.breaks = true }, want: ErrBroken},
		"another text":             {is: func(n *network) { n.answer = strings.Replace(plain, "yes", "no", 1) }, want: ErrWrong},
		"no answer at all":         {is: func(n *network) { n.answer = `{"choices":[]}` }, want: ErrWrong},
		"stream that is no JSON":   {is: func(n *network) { n.answer = "data: yes\n\ndata: [DONE]\n\n" }, stream: true, want: ErrWrong},
		"receipt of other bytes":   {is: func(n *network) { n.another = true }, want: ErrWrong},
		"receipt comes after all":  {is: func(n *network) { n.late = time.Minute }, late: true},
		"receipt comes to no good": {is: func(n *network) { n.late = time.Hour }, want: ErrWrong},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				c.is(n)
				a, err := n.client().Ask(t.Context(), Request{Prompt: "?", Tokens: 2, Stream: c.stream, Want: "yes"})
				if !errors.Is(err, c.want) {
					t.Fatalf("error %v, want %v", err, c.want)
				}
				if c.want == nil && (string(a.Body) != n.answer || a.Text != "yes" || a.Late != c.late) {
					t.Errorf("%+v", a)
				}
			})
		})
	}
}

func TestRefusal(t *testing.T) {
	n := newNetwork(t)
	n.status, n.answer = http.StatusServiceUnavailable, `{"error":{"code":"storage","message":"x"}}`
	_, err := n.client().Ask(t.Context(), Request{})
	var r *Refusal
	if !errors.As(err, &r) || r.Status != n.status || r.Code != "storage" || r.RetryAfter != "3" {
		t.Errorf("%+v", err)
	}
}

// A crowd knows what it got: also when the network forgets it.
func TestCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		n.answer = streamed + "data: [DONE]\n\n"
		crowd := n.client().Crowd(t.Context(), 2, time.Second, Request{Want: "yes"})
		node := strings.ToUpper(n.key.Address().Hex())
		if err := crowd.WaitAnswer(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10*time.Second + time.Millisecond) // nobody asks at that instant
		resume := crowd.Quiet()
		first := crowd.Take()
		half := first.Sent / 2 // the plain ones, which n answers with a stream
		if first.Sent < 10 || first.Answered < half || first.Wrong < half || first.Answered+first.Wrong != first.Sent || !errors.Is(first.Fault(), ErrWrong) {
			t.Errorf("%s", &first)
		}
		since := time.Now()
		if none := crowd.Take(); none != (Tally{}) || len(crowd.Answers(since)) != 0 {
			t.Errorf("%s", &none)
		}
		n.same = receipt.NewJobID()
		resume()
		if err := crowd.WaitAnswer(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		crowd.Stop()
		if twice := crowd.Take(); twice.Twice == 0 || twice.Twice != twice.Answered-1 || twice.Fault() == nil {
			t.Errorf("%s", &twice)
		}
		all, lost, err := crowd.Recheck(t.Context(), time.Time{})
		if all != first.Answered+1 || lost != 0 || err != nil {
			t.Errorf("%d of %d lost, %v", lost, all, err)
		}
		clear(n.signed)
		if all, lost, err := crowd.Recheck(t.Context(), since); all != 1 || lost != 1 || !errors.Is(err, ErrWrong) {
			t.Errorf("%d of %d lost, %v", lost, all, err)
		}
		gone, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := crowd.WaitAnswer(gone, node); err == nil {
			t.Error("an answer came after the end")
		}
	})
}

// The first that is wrong is said before the first that is refused.
func TestTally(t *testing.T) {
	refused, wrong, second := errors.New("refused"), errors.New("wrong"), errors.New("second")
	var sum Tally
	for _, o := range []Tally{{Sent: 1, Refused: 1, First: refused}, {Sent: 1, Wrong: 1, First: wrong}, {Sent: 1, Wrong: 1, First: second}, {Sent: 1, Answered: 1}} {
		sum.Add(&o)
	}
	if sum != (Tally{Sent: 4, Answered: 1, Refused: 1, Wrong: 2, First: wrong}) {
		t.Errorf("%s", &sum)
	}
}
