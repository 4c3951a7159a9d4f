package rules

import (
	"testing"

	"github.com/resultity/node/test/crash"
)

// bare are functions that make something durable or tell somebody something,
// and need no fail point, with the reason.
var bare = map[string]string{
	"durable.SyncDir":                         "its callers know what they sync for",
	"model.Store.sync":                        "likewise",
	"order.Open":                              "it moves away what is damaged twice; the next start finds that, or writes behind it",
	"state.directory.rename":                  "likewise",
	"state.directory.sync":                    "likewise",
	"state.writeAside":                        "what it writes is evidence; the next start that finds the damage writes it again",
	"state.makeFile":                          "a file without a name that counts; its callers give it one",
	"network/nodes.session.writeFrame":        "say, which calls it, knows the message",
	"network/nodes.session.write":             "pings, on which nothing rests",
	"network/nodes.places.take":               "likewise",
	"network/nodes.session.close":             "the close frame, likewise",
	"session.link.ping":                       "likewise",
	"session.link.closeFrame":                 "likewise",
	"network/store.Store.voidJob":             "of a job whose writing failed; a test of store stops it half-way",
	"network/store.Store.setRequests":         "deletes what nothing rests on",
	"network/store.Store.PutReplay":           "one write, on which nothing rests; whoever asked is told behind it",
	"network/store.Store.bound":               "deletes what is too much; the next record of the node has it done again",
	"network/store.Store.mendAll":             "the mark that it removes only saves the next start a look",
	"network/store.lost.remove":               "the operator is told behind it, and may say it again",
	"network/store/blocks.Stream.MendMeta":    "sets aside what is damaged; the next start does it again",
	"network/store/blocks.Stream.takeRescued": "mending that is cut off begins anew; tests of blocks stop it",
	"network/store/blocks.Stream.unindex":     "likewise",
	"network/store.tryWrite":                  "what it writes means nothing",
	"signer.Counters.put":                     "write, which calls it, has them; what the start writes with it was there before",
	"spool.Spool.run":                         "a record of the log may be lost, and is counted then",
	"spool.Spool.Close":                       "likewise",
}

// What a crash can cut in two is walked by test/crash, so it has a name.
func TestDurablePlacesHaveFailPoints(t *testing.T) {
	if _, err := crash.Points(root); err != nil {
		t.Error(err)
	}
	found, err := crash.Bare(root)
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]bool{}
	for name := range bare {
		left[name] = true
	}
	for _, name := range found {
		if bare[name] == "" {
			t.Errorf("%s makes something durable, or tells somebody, and has no fail point: add failpoint.Here before and after, or say why not", name)
		}
		delete(left, name)
	}
	for name := range left {
		t.Errorf("%s is on the list of those without a fail point, and is none of them", name)
	}
}
