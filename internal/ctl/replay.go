package ctl

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
)

// maxBody bounds a request or a response from a file, in bytes, as networks do.
const maxBody = 16 << 20

func (c *command) replayCommand() *cobra.Command {
	var request, response, signed string
	var q control.ReplayRequest
	timeout := 5 * time.Minute
	cmd := &cobra.Command{
		Use: "replay JOB", Short: "Run a request again and say whether the answer is the same",
		Long: `Run a request again, on the deployment that serves now, and say whether text,
finish reason and token counts are the same.

JOB is one of those that are kept: resultityctl jobs lists them, and replay.keep
of agent.toml says how many there are, by default none. The other form takes what
a client has, whichever node of the network it was that answered:

  resultityctl replay --request FILE --response FILE --receipt FILE

Request and response are the bodies of HTTP, byte for byte; the receipt shows that
they belong together.

It prints SAME; DIFFERENT with the place of the first difference, in characters
from the beginning; or NOT COMPARABLE and why: an answer of another model, image or
class of hardware, or one whose tokens were drawn at random with a seed that nobody
knows. A single DIFFERENT is no proof of a fault: engines may compute in another
order when they have several requests at once, and a token that was a close call
falls the other way. Repeat it while the node is idle.

A replay uses a slot that no job wants, and begins anew when one does. No receipt
comes of it, and the network hears of it only as an event in the log, without text.

Exit status: 0 the same; 2 different; 3 not comparable; others as usual.`,
		Args: func(_ *cobra.Command, a []string) error {
			files := request != "" || response != "" || signed != ""
			switch {
			case len(a) == 1 && !files, len(a) == 0 && request != "" && response != "" && signed != "":
				return nil
			}
			return fmt.Errorf("%w: want either a JOB, or all of --request, --response and --receipt", errUsage)
		},
	}
	f := cmd.Flags()
	f.StringVar(&request, "request", "", "`file` with the body of the request")
	f.StringVar(&response, "response", "", "`file` with the body of the response")
	f.StringVar(&signed, "receipt", "", "`file` with the receipt")
	f.BoolVar(&q.Show, "show", false, "also print what both answers say where they differ: other people's words")
	f.DurationVar(&timeout, "timeout", timeout, "how long it may take, with waiting for a slot")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if timeout < time.Second || timeout > control.MaxReplayTime {
			return fmt.Errorf("%w: --timeout %v: want 1s to %v", errUsage, timeout, control.MaxReplayTime)
		}
		q.Network, q.TimeoutS = c.network, int(timeout/time.Second)
		if len(args) == 1 {
			q.Job = args[0]
		}
		for _, from := range []struct {
			name string
			to   *[]byte
			most int64
		}{{request, &q.Request, maxBody}, {response, &q.Response, maxBody}, {signed, &q.Receipt, receipt.MaxSize}} {
			if from.name == "" {
				continue
			}
			if *from.to, err = durable.ReadFile(from.name, from.most); err != nil {
				return err
			}
		}
		return c.replay(cmd.Context(), q)
	}
	return cmd
}

func (c *command) replay(ctx context.Context, q control.ReplayRequest) error {
	v, err := c.client().Replay(ctx, q)
	if err != nil {
		return err
	}
	if err := c.show(v, func(w *tabwriter.Writer) { writeReplay(w, &v, q.Show) }); err != nil {
		return err
	}
	switch v.Verdict {
	case openai.Same:
		return nil
	case openai.Different:
		return exitError(ExitClosed)
	}
	return exitError(ExitIncomparable)
}

func writeReplay(w io.Writer, v *control.Replay, show bool) {
	word := strings.ToUpper(strings.ReplaceAll(string(v.Verdict), "_", " "))
	switch {
	case v.Difference != nil:
		fmt.Fprintf(w, "%s\t%s\n", word, v.Difference)
	case v.Reason != "":
		fmt.Fprintf(w, "%s\t%s\n", word, line(v.Reason))
	default:
		fmt.Fprintf(w, "%s\t%d prompt and %d completion tokens\n", word, v.PromptTokens, v.CompletionTokens)
	}
	fmt.Fprintf(w, "job\t%s\nnetwork\t%s\nmodel\t%s\ntook\t%v\n", v.Job, v.Network, v.Model, time.Duration(v.TookMS)*time.Millisecond)
	if show && (v.Was != "" || v.Is != "") {
		fmt.Fprintf(w, "was\t%q\nis\t%q\n", v.Was, v.Is)
	}
}
