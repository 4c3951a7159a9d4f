// Command engine is the instant engine, which goes wrong when it is told to.
// It stands in for an engine with a defect, which cannot be had to order, and
// is told by a signal from outside of its container:
//
//	SIGUSR1   hang: answers begin and do not go on; /health says that all is well
//	SIGUSR2   garbage: answers are not what the API promises
//	SIGHUP    ramble: answers have no end
//	SIGWINCH  mute: nothing is answered at all
//	SIGIO     wrong: answers are as the API promises, of other words
//	SIGPWR    leak: takes memory until there is none
//
// Only a new process forgets what it was told.
package main

import (
	"bytes"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/resultity/node/test/bench/instant"
)

func main() {
	log.SetFlags(0)
	log.Print("this is an engine for tests of faults: no model, known words")
	var told atomic.Value // syscall.Signal
	told.Store(syscall.Signal(0))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGHUP, syscall.SIGWINCH, syscall.SIGIO, syscall.SIGPWR)
	go func() {
		s := (<-signals).(syscall.Signal)
		log.Print("told: ", s)
		if s == syscall.SIGPWR {
			leak()
		}
		told.Store(s)
	}()
	s := &http.Server{
		Addr: instant.Address(os.Args[1:]), ReadHeaderTimeout: 10 * time.Second,
		Handler: &faulty{good: instant.Handler(), told: func() syscall.Signal { return told.Load().(syscall.Signal) }},
	}
	log.Fatal(s.ListenAndServe())
}

// leak takes memory until the process is ended for it.
func leak() {
	var all [][]byte
	for {
		b := make([]byte, 16<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
		runtime.KeepAlive(all)
	}
}

type faulty struct {
	good http.Handler
	told func() syscall.Signal
}

// ServeHTTP implements [http.Handler].
func (f *faulty) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	told := f.told()
	health := r.URL.Path == "/health"
	switch {
	case told == syscall.SIGWINCH:
		<-r.Context().Done()
	case health:
		f.good.ServeHTTP(w, r)
	case told == syscall.SIGUSR2:
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"choices\": \"of words\"}\n\ndata: \x00\xff\n\n")
	case told == syscall.SIGHUP:
		w.Header().Set("Content-Type", "text/event-stream")
		out := http.NewResponseController(w)
		for i := 0; ; i++ {
			_, err := fmt.Fprintf(w, "data: {\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"content\":%q},\"finish_reason\":null}]}\n\n", instant.Token(i))
			if err != nil || out.Flush() != nil {
				return
			}
			select {
			case <-time.After(5 * time.Millisecond): // as a model that does not stop
			case <-r.Context().Done():
				return
			}
		}
	case told == syscall.SIGIO:
		f.good.ServeHTTP(wrong{w}, r)
	default:
		// A stream that runs when the signal comes hangs, too.
		f.good.ServeHTTP(&hanging{ResponseWriter: w, told: f.told, gone: r.Context().Done()}, r)
	}
}

// wrong is a response with another first word.
type wrong struct{ http.ResponseWriter }

// Unwrap is for [http.ResponseController].
func (w wrong) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Write implements [http.ResponseWriter].
func (w wrong) Write(p []byte) (int, error) {
	if _, err := w.ResponseWriter.Write(bytes.ReplaceAll(p, []byte(instant.Token(0)), []byte("wrong"))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// hanging is a response that stops when the engine was told to hang.
type hanging struct {
	http.ResponseWriter
	told func() syscall.Signal
	gone <-chan struct{}
}

// Unwrap is for [http.ResponseController].
func (h *hanging) Unwrap() http.ResponseWriter { return h.ResponseWriter }

// Write implements [http.ResponseWriter].
func (h *hanging) Write(p []byte) (int, error) {
	if h.told() == syscall.SIGUSR1 {
		_ = http.NewResponseController(h.ResponseWriter).Flush() // the head, so that the answer has begun
		<-h.gone
	}
	return h.ResponseWriter.Write(p)
}
