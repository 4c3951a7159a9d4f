package crash

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
)

// The clock of a node jumps by an hour, while a job runs. The network does not
// listen to the node then, the operator is told why and what to do, and all goes
// on when the clock is right again: also the job.
func (w *world) clock(t *testing.T) {
	file := w.node.State + "/agent/clock-offset"
	for _, jump := range []string{"1h", "-1h"} {
		t.Run(jump, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), perPoint)
			defer cancel()
			missing := w.missing(t)
			answer := w.slowly(ctx)
			if err := w.node.WaitStatus(ctx, "a job", func(s *control.Status) bool { return s.Busy > 0 }); err != nil {
				t.Fatal(err)
			}
			since := time.Now()
			must(t, w.node.WriteFile(file, []byte(jump), 0o644))
			if err := w.node.WaitStatus(ctx, "being told of the clock", func(s *control.Status) bool {
				g := s.Closed()
				return !s.GetsJobs() && g != nil && strings.Contains(g.Remedy, "timedatectl")
			}); err != nil {
				s, _ := w.node.Status(ctx)
				t.Errorf("%v: %+v\n%s", err, s, w.node.Journal(ctx, 20))
			}
			out, err := w.node.Output(ctx, "journalctl", "--no-pager", "--since", fmt.Sprintf("@%d", since.Unix()), "RESULTITY_EVENT=clock-wrong")
			if err != nil || !strings.Contains(string(out), "clocks") {
				t.Errorf("the journal does not say that the clock is wrong (%v):\n%s", err, out)
			}
			if out, err := w.node.Output(ctx, "rm", file); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			must(t, w.recovered(ctx))
			if err := <-answer; err != nil {
				t.Errorf("the job that ran when the clock jumped: %v", err)
			}
			if now := w.missing(t); now != missing {
				t.Errorf("clients have got %d answers more than the network has counted results", now-missing)
			}
		})
	}
}

// slowly asks for an answer that takes a few seconds.
func (w *world) slowly(ctx context.Context) <-chan error {
	answer := make(chan error, 1)
	go func() {
		_, err := w.load.Ask(ctx, chat.Request{Prompt: instant.Pace(100 * time.Millisecond), Tokens: 40, Stream: true})
		answer <- err
	}()
	return answer
}
