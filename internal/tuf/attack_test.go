package tuf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
)

// An attack is what a hostile server does to a node that has seen version 2 of
// everything.
type attack struct {
	name string // class/case, which is the name of its subtest
	do   func(t *testing.T, n *network, c *Client)

	want  error // what the refresh fails with; nil if what is served is to be taken,
	takes int   // and then which version of the configuration

	// What the attacker has beside the path to the node.
	online bool // online keys: the operator renews them
	root   bool // enough root keys: what they signed is part of the history, and superseded
	stuck  bool // and more than this node follows: it needs a package with a later root

	after func(t *testing.T, n *network, c *Client, err error) // looks at more than the error
}

const day = 24 * time.Hour

// Of the attacks that the TUF specification names (section 1.5.2), and of forms
// that make a careless reader err.
var attacks = slices.Concat(
	arbitrarySoftware, rollBack, fastForward, freeze, mixAndMatch, endlessData, keyCompromise, rootRotation, hashes, paths, forms,
)

var arbitrarySoftware = []attack{
	{name: "arbitrary software/another network's repository", want: ErrUnsigned, do: func(t *testing.T, n *network, _ *Client) {
		other := newNetwork(t)
		other.publish(t, 2)
		other.publish(t, 3)
		for _, name := range []string{"metadata/timestamp.json", "metadata/3.snapshot.json", "metadata/3.targets.json", "targets/" + digest.Of(config(t, 3)).Hex() + ".config.json"} {
			n.overlay[name] = other.file(t, name)
		}
	}},
	{name: "arbitrary software/other configuration of the same length", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3)})
		n.overlay["targets/"+digest.Of(config(t, 3)).Hex()+".config.json"] = config(t, 4)
	}},
	{name: "arbitrary software/configuration cut short", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3)})
		n.overlay["targets/"+digest.Of(config(t, 3)).Hex()+".config.json"] = config(t, 3)[:100]
	}},
	{name: "arbitrary software/configuration with more behind it", want: ErrTooLarge, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3)})
		n.overlay["targets/"+digest.Of(config(t, 3)).Hex()+".config.json"] = append(config(t, 3), ' ')
	}},
	{name: "arbitrary software/timestamp unsigned", want: ErrUnsigned, do: forgeWith("timestamp")},
	{name: "arbitrary software/snapshot unsigned", want: ErrUnsigned, online: true, do: forgeWith("snapshot")},
	{name: "arbitrary software/targets unsigned", want: ErrUnsigned, online: true, do: forgeWith("targets")},
	{name: "arbitrary software/root unsigned", want: ErrUnsigned, do: signRoot(nil)},
}

var rollBack = []attack{
	{name: "roll-back/older timestamp", want: ErrRollback, do: func(_ *testing.T, n *network, _ *Client) {
		n.overlay["metadata/timestamp.json"] = n.old
	}},
	{name: "roll-back/older snapshot, with the timestamp key", want: ErrRollback, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) {
			s.Meta["snapshot.json"] = describe(1, n.file(t, "metadata/1.snapshot.json"))
		}})
	}},
	{name: "roll-back/older targets, with the snapshot and timestamp keys", want: ErrRollback, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) {
			s.Meta["targets.json"] = describe(1, n.file(t, "metadata/1.targets.json"))
		}})
	}},
	{name: "roll-back/older root for the next", want: ErrRoot, do: func(t *testing.T, n *network, _ *Client) {
		n.overlay["metadata/2.root.json"] = n.root(t)
	}},
	{name: "roll-back/targets taken out of the snapshot", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) {
			s.Meta["other.json"] = s.Meta["targets.json"]
			delete(s.Meta, "targets.json")
		}})
	}},
}

// What was published with absurdly high versions is taken, as it has to be. The
// operator's versions are refused then, until the keys are renewed.
var fastForward = []attack{
	{name: "fast-forward/timestamp", want: ErrRollback, online: true, do: forward(forged{timestamp: func(s *metadata.TimestampType) { s.Version = math.MaxInt64 }})},
	{name: "fast-forward/snapshot", want: ErrRollback, online: true, do: forward(forged{version: 1 << 60})},
	{name: "fast-forward/targets", want: ErrRollback, online: true, do: forward(forged{targets: func(s *metadata.TargetsType) { s.Version = math.MaxInt64 }})},
}

func forward(f forged) func(*testing.T, *network, *Client) {
	return func(t *testing.T, n *network, c *Client) {
		f.config = config(t, 2)
		n.forge(t, f)
		sees(t, c, 2)
		n.overlay = map[string][]byte{}
	}
}

var freeze = []attack{
	{name: "freeze/server stands still for a day", want: ErrExpired, do: func(*testing.T, *network, *Client) { time.Sleep(25 * time.Hour) }},
	{name: "freeze/server stands still until everything has expired", want: ErrExpired, online: true, do: func(*testing.T, *network, *Client) { time.Sleep(400 * day) }},
	{name: "freeze/expired timestamp", want: ErrExpired, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Expires = past() }})
	}},
	{name: "freeze/expired snapshot", want: ErrExpired, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Expires = past() }})
	}},
	{name: "freeze/expired targets", want: ErrExpired, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) { s.Expires = past() }})
	}},
	{name: "freeze/expired root", want: ErrExpired, root: true, do: useRoot(func(s *metadata.RootType) { s.Expires = past() })},
	{name: "freeze/timestamp for a hundred years, with its key", want: ErrExpired, online: true, do: func(t *testing.T, n *network, c *Client) {
		n.forge(t, forged{config: config(t, 2), timestamp: func(s *metadata.TimestampType) { s.Expires = time.Now().AddDate(100, 0, 0).UTC() }})
		sees(t, c, 2)
		if e := remembers(t, c, 2).Expires(); time.Until(e) > day {
			t.Errorf("the configuration expires on %v, and its snapshot before", e)
		}
		time.Sleep(25 * time.Hour) // the other roles' signatures end
	}},
}

var mixAndMatch = []attack{
	{name: "mix-and-match/old snapshot under a new timestamp", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) {
			s.Meta["snapshot.json"].Length = int64(len(n.file(t, "metadata/2.snapshot.json")))
		}})
		n.overlay["metadata/100.snapshot.json"] = n.file(t, "metadata/2.snapshot.json")
	}},
	{name: "mix-and-match/other snapshot of the same length", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{})
		n.overlay["metadata/100.snapshot.json"] = flip(n.overlay["metadata/100.snapshot.json"], 40)
	}},
	{name: "mix-and-match/other targets of the same length", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{})
		n.overlay["metadata/100.targets.json"] = flip(n.overlay["metadata/100.targets.json"], 40)
	}},
	{name: "mix-and-match/targets of another version than the snapshot names", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Version = 50 }})
		n.overlay["metadata/50.targets.json"] = n.overlay["metadata/100.targets.json"]
	}},
	{name: "mix-and-match/snapshot of another version than the timestamp names", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Version = 50 }})
		n.overlay["metadata/50.snapshot.json"] = n.overlay["metadata/100.snapshot.json"]
	}},
}

var endlessData = slices.Concat([]attack{
	endlessBody("metadata/2.root.json", chain.MaxRoot),
	endlessBody("metadata/timestamp.json", chain.MaxTimestamp),
	endlessBody("metadata/100.snapshot.json", chain.MaxSnapshot),
	endlessBody("metadata/100.targets.json", chain.MaxTargets),
	endlessBody("config.json", snapshot.MaxSize),
}, []attack{
	{name: "endless data/absurd length of the snapshot", want: ErrTooLarge, online: true, after: unasked("100.snapshot.json"), do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length = chain.MaxSnapshot + 1 }})
	}},
	{name: "endless data/absurd length of targets", want: ErrTooLarge, online: true, after: unasked("100.targets.json"), do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Length = 1 << 40 }})
	}},
	{name: "endless data/absurd length of the configuration", want: snapshot.ErrInvalid, online: true, after: unasked("config.json"), do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3), targets: func(s *metadata.TargetsType) { s.Targets[snapshot.Target].Length = snapshot.MaxSize + 1 }})
	}},
	{name: "endless data/length one too small", want: ErrTooLarge, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length-- }})
	}},
	{name: "endless data/a byte a second", want: ErrUnreachable, do: func(_ *testing.T, n *network, _ *Client) {
		n.begun = time.Now()
		n.intercept = func(r *http.Request, name string) *http.Response {
			if name == "metadata/timestamp.json" {
				return &http.Response{StatusCode: 200, ContentLength: -1, Body: drip{r}}
			}
			return nil
		}
	}, after: took(fetchTimeout)},
	{name: "endless data/silence", want: ErrUnreachable, do: func(_ *testing.T, n *network, _ *Client) {
		n.begun = time.Now()
		n.intercept = func(r *http.Request, _ string) *http.Response {
			<-r.Context().Done()
			return nil
		}
	}, after: took(fetchTimeout)},
	// Each file in its time, all together without end. What root keys have signed
	// counts from where it was cut off.
	{name: "endless data/slow roots", want: ErrUnreachable, root: true, do: func(t *testing.T, n *network, _ *Client) {
		n.begun = time.Now()
		n.rootsWithoutEnd(t, 25*time.Second)
	}, after: took(refreshTimeout)},
	{name: "endless data/roots", want: ErrTooLarge, root: true, stuck: true, do: func(t *testing.T, n *network, _ *Client) { n.rootsWithoutEnd(t, 0) }, after: func(t *testing.T, n *network, c *Client, err error) {
		if !strings.Contains(err.Error(), "install a newer package") {
			t.Errorf("no remedy in: %v", err)
		}
		remembers(t, n.clientAt(t, c.dir, n.root(t)), 2) // the roots fit the cache
	}},
})

// keyCompromise is what keys below a threshold are good for: nothing.
var keyCompromise = []attack{
	{name: "key compromise/timestamp by the snapshot key", want: ErrUnsigned, do: forgeWith("timestamp", "snapshot")},
	{name: "key compromise/snapshot by the timestamp key", want: ErrUnsigned, online: true, do: forgeWith("snapshot", "timestamp")},
	{name: "key compromise/targets by the snapshot and timestamp keys", want: ErrUnsigned, online: true, do: forgeWith("targets", "snapshot", "timestamp")},
	{name: "key compromise/targets by the root keys", want: ErrUnsigned, online: true, do: forgeWith("targets", "root-1", "root-2", "root-3")},
	{name: "key compromise/root by one of its keys", want: ErrUnsigned, do: signRoot(nil, "root-1")},
	{name: "key compromise/root by one of its keys and the online ones", want: ErrUnsigned, do: signRoot(nil, "root-1", "targets", "snapshot", "timestamp")},
	{name: "key compromise/root with one signature twice", want: ErrMalformed, do: signatures(func(sigs []metadata.Signature) []metadata.Signature {
		return append(sigs[:1], sigs[0])
	})},
	{name: "key compromise/root with one signature under two key ids", want: ErrUnsigned, do: signatures(func(sigs []metadata.Signature) []metadata.Signature {
		return []metadata.Signature{sigs[0], {KeyID: sigs[1].KeyID, Signature: sigs[0].Signature}}
	})},
	{name: "key compromise/root with a key under two key ids", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) {
		r := s.Roles["root"]
		k := *s.Keys[r.KeyIDs[0]]
		k.Value.PublicKey = strings.ToUpper(k.Value.PublicKey) // the same bytes
		again := metadata.Key{Type: k.Type, Scheme: k.Scheme, Value: k.Value}
		id, _ := again.ID() // a key of three strings has one
		s.Keys[id], r.KeyIDs = &again, append(r.KeyIDs, id)
	}, "root-1", "root-2")},
	{name: "key compromise/root with a key id of its own choice", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) {
		r := s.Roles["timestamp"]
		s.Keys["mine"], r.KeyIDs = s.Keys[r.KeyIDs[0]], []string{"mine"}
	}, "root-1", "root-2")},
	{name: "key compromise/online keys that a root has revoked", want: ErrUnsigned, do: func(t *testing.T, n *network, c *Client) {
		n.forge(t, forged{config: config(t, 3)})
		stolen := n.overlay
		n.overlay = map[string][]byte{}
		n.rotate(t, "timestamp", "snapshot", "targets")
		sees(t, c, 2)
		n.overlay = stolen
	}},
	{name: "key compromise/root key that a root has revoked", want: ErrUnsigned, do: func(t *testing.T, n *network, c *Client) {
		k, err := publish.MakeKey(n.keyFiles("root-4")[0], nil)
		if err != nil {
			t.Fatal(err)
		}
		n.follow(t, publish.Change{Add: []publish.Public{k.Public("dora")}, Remove: []string{"root-1"}}, "root-1", "root-2", "root-4")
		sees(t, c, 2)
		n.nextRoot(t, nil, "root-1", "root-3")
	}},
}

var rootRotation = []attack{
	{name: "root rotation/a version skipped", want: ErrRoot, do: signRoot(func(s *metadata.RootType) { s.Version = 3 }, "root-1", "root-2")},
	{name: "root rotation/signed by the next keys alone", want: ErrUnsigned, do: signRoot(func(s *metadata.RootType) { s.Roles["root"] = s.Roles["targets"] }, "targets")},
	{name: "root rotation/signed by the present keys alone", want: ErrUnsigned, do: signRoot(func(s *metadata.RootType) { s.Roles["root"] = s.Roles["targets"] }, "root-1", "root-2")},
	{name: "root rotation/threshold lowered by one key", want: ErrUnsigned, do: signRoot(func(s *metadata.RootType) { s.Roles["root"].Threshold = 1 }, "root-1")},
	{name: "root rotation/threshold lowered by its keys", takes: 2, root: true, do: useRoot(func(s *metadata.RootType) { s.Roles["root"].Threshold = 1 })},
	{name: "root rotation/threshold of nothing", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) { s.Roles["root"].Threshold = 0 }, "root-1", "root-2")},
	{name: "root rotation/threshold of nothing for targets", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) { s.Roles["targets"].Threshold = 0 }, "root-1", "root-2")},
	{name: "root rotation/threshold above the keys", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) { s.Roles["targets"].Threshold = 2 }, "root-1", "root-2")},
	{name: "root rotation/no role timestamp", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) { delete(s.Roles, "timestamp") }, "root-1", "root-2")},
	{name: "root rotation/a role with a key that is nowhere", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) {
		r := s.Roles["timestamp"]
		r.KeyIDs = append(r.KeyIDs, digest.Of(nil).Hex())
	}, "root-1", "root-2")},
	{name: "root rotation/consistent snapshots off", want: ErrRoot, do: signRoot(func(s *metadata.RootType) { s.ConsistentSnapshot = false }, "root-1", "root-2")},
	{name: "root rotation/another role's file", want: ErrMalformed, do: func(t *testing.T, n *network, _ *Client) {
		n.overlay["metadata/2.root.json"] = n.file(t, "metadata/timestamp.json")
	}},
}

var hashes = []attack{
	{name: "hashes/configuration by SHA-512 alone", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) {
			info, err := metadata.TargetFile().FromBytes(snapshot.Target, config(t, 3), "sha512")
			if err != nil {
				t.Fatal(err)
			}
			s.Targets[snapshot.Target] = info
		}})
	}},
	{name: "hashes/configuration by MD5, too", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3), targets: func(s *metadata.TargetsType) { s.Targets[snapshot.Target].Hashes["md5"] = make([]byte, 16) }})
	}},
	{name: "hashes/configuration by the front of a SHA-256", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) {
			h := s.Targets[snapshot.Target].Hashes
			h["sha256"] = h["sha256"][:16]
		}})
	}},
	{name: "hashes/snapshot without any", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Hashes = nil }})
	}},
	{name: "hashes/snapshot by SHA-1", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) {
			s.Meta["snapshot.json"].Hashes = metadata.Hashes{"sha1": make([]byte, 20)}
		}})
	}},
	{name: "hashes/targets without any", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Hashes = nil }})
	}},
	{name: "hashes/targets without a length", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Length = 0 }})
	}},
}

var paths = []attack{
	{name: "paths/hash that leads out of the directory", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) { s.Targets[snapshot.Target].Hashes["sha256"] = []byte("../../x") }})
	}},
	{name: "paths/target by other ways to its name", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) {
			info := s.Targets[snapshot.Target]
			clear(s.Targets)
			for _, name := range []string{"./config.json", "/config.json", "../config.json", "CONFIG.JSON", "config.json/", "config.json\x00"} {
				s.Targets[name] = info
			}
		}})
	}},
	{name: "paths/more targets than the one", takes: 3, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3), targets: func(s *metadata.TargetsType) {
			for _, name := range []string{"../../etc/passwd", "/etc/passwd"} {
				s.Targets[name] = s.Targets[snapshot.Target]
			}
		}})
	}, after: func(t *testing.T, n *network, _ *Client, _ error) {
		for _, name := range n.fetched {
			if strings.Contains(name, "passwd") {
				t.Errorf("fetched %s", name)
			}
		}
	}},
	{name: "paths/a role that delegates", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3), targets: func(s *metadata.TargetsType) {
			s.Delegations = &metadata.Delegations{Keys: map[string]*metadata.Key{}, Roles: []metadata.DelegatedRole{{Name: "evil", KeyIDs: []string{"x"}, Threshold: 1, Paths: []string{"*"}}}}
		}})
	}},
}

var forms = []attack{
	{name: "forms/no snapshot named", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { clear(s.Meta) }})
	}},
	{name: "forms/null for the snapshot", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"] = nil }})
	}},
	{name: "forms/null for targets", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"] = nil }})
	}},
	{name: "forms/null for the target", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) { s.Targets[snapshot.Target] = nil }})
	}},
	{name: "forms/null for a key of the root", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) { s.Keys[s.Roles["root"].KeyIDs[0]] = nil }, "root-1", "root-2")},
	{name: "forms/null for a role of the root", want: ErrMalformed, do: signRoot(func(s *metadata.RootType) { s.Roles["root"] = nil }, "root-1", "root-2")},
	{name: "forms/no target named", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{targets: func(s *metadata.TargetsType) { clear(s.Targets) }})
	}},
	{name: "forms/negative length", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length = -1 }})
	}},
	{name: "forms/negative version", want: ErrRollback, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Version = -1 }})
	}},
	{name: "forms/a later specification", want: ErrMalformed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.SpecVersion = "2.0.0" }})
	}},
	{name: "forms/an unknown field that is signed", takes: 3, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{config: config(t, 3), timestamp: func(s *metadata.TimestampType) { s.UnrecognizedFields = map[string]any{"later": "x"} }})
	}},
	rewrite("an unknown field that is not signed", ErrUnsigned, `"signed": {`, `"signed": {"later": "x",`),
	rewrite("an unknown field beside what is signed", ErrMalformed, `"signed": {`, `"later": "x", "signed": {`),
	rewrite("a name twice", ErrMalformed, `"_type"`, `"version": 9, "_type"`),
	rewrite("signed twice", ErrMalformed, `"signed": {`, `"signed": {"_type": "timestamp"}, "signed": {`),
	rewrite("a name twice that differs in case", ErrMalformed, `"_type"`, `"VERSION": 9, "_type"`),
	rewrite("a name twice in another spelling", ErrMalformed, `"signed": {`, `"\u0073igned": {"_type": "timestamp"}, "signed": {`),
	rewrite("a number that is no integer", ErrMalformed, `"version": 2`, `"version": 2.0`),
	rewrite("a number with an exponent", ErrMalformed, `"version": 2`, `"version": 2e0`),
	rewrite("a byte that is no UTF-8", ErrMalformed, `"timestamp"`, "\"timestamp\xff\""),
	rewrite("a byte order mark", ErrMalformed, "{", "\ufeff{"),
	rewrite("nested deeply", ErrMalformed, `"signed": {`, `"signed": {"later": `+strings.Repeat("[", 20)+strings.Repeat("]", 20)+`,`),
	rewrite("no signatures", ErrMalformed, `"signatures"`, `"signature"`),
	// White space and spelling are not signed, and say nothing.
	{name: "forms/other white space", takes: 2, do: func(t *testing.T, n *network, _ *Client) {
		var b bytes.Buffer
		if err := json.Compact(&b, n.file(t, "metadata/timestamp.json")); err != nil {
			t.Fatal(err)
		}
		n.overlay["metadata/timestamp.json"] = b.Bytes()
	}},
	served("something behind the end", func(raw []byte) []byte { return append(raw, "{}"...) }),
	served("a page of a captive portal", func([]byte) []byte { return []byte("<html>") }),
	served("nothing", func([]byte) []byte { return []byte{} }),
	served("null", func([]byte) []byte { return []byte("null") }),
	served("a list", func([]byte) []byte { return []byte("[]") }),
	served("a file cut short", func(raw []byte) []byte { return raw[:len(raw)/2] }),
	served("nested without end", func([]byte) []byte { return bytes.Repeat([]byte("["), chain.MaxTimestamp) }),
	{name: "forms/a null without a signature", want: ErrMixed, online: true, do: func(t *testing.T, n *network, _ *Client) {
		n.forge(t, forged{})
		raw := n.overlay["metadata/100.targets.json"]
		n.overlay["metadata/100.targets.json"] = fmt.Appendf(nil, "%-*s", len(raw), `{"signed":{"_type":"targets","targets":{"x":null}},"signatures":[]}`)
	}},
	{name: "forms/redirect to http", want: ErrRedirect, do: redirectTo("http://network.example/tuf/metadata/timestamp.json?moved")},
	{name: "forms/redirect to a file", want: ErrRedirect, do: redirectTo("file:///etc/passwd")},
	{name: "forms/redirect in a circle", want: ErrRedirect, do: redirectTo(base + "/metadata/timestamp.json")},
}

func past() time.Time { return time.Now().Add(-time.Minute).UTC().Truncate(time.Second) }

// rewrite changes the text of timestamp.json.
func rewrite(name string, want error, old, to string) attack {
	return attack{name: "forms/" + name, want: want, do: func(t *testing.T, n *network, _ *Client) {
		raw := n.file(t, "metadata/timestamp.json")
		if !bytes.Contains(raw, []byte(old)) {
			t.Fatalf("no %s in %s", old, raw)
		}
		n.overlay["metadata/timestamp.json"] = bytes.Replace(raw, []byte(old), []byte(to), 1)
	}}
}

// served sends something else for timestamp.json that cannot be read.
func served(name string, instead func([]byte) []byte) attack {
	return attack{name: "forms/" + name, want: ErrMalformed, do: func(t *testing.T, n *network, _ *Client) {
		n.overlay["metadata/timestamp.json"] = instead(n.file(t, "metadata/timestamp.json"))
	}}
}

func redirectTo(to string) func(*testing.T, *network, *Client) {
	return func(_ *testing.T, n *network, _ *Client) {
		n.intercept = func(r *http.Request, name string) *http.Response {
			if name != "metadata/timestamp.json" || r.URL.RawQuery != "" {
				return nil
			}
			return &http.Response{StatusCode: http.StatusFound, Header: http.Header{"Location": {to}}, Body: http.NoBody}
		}
	}
}

// forgeWith puts a newer set in front whose role is signed by keys only.
func forgeWith(role string, keys ...string) func(*testing.T, *network, *Client) {
	return func(t *testing.T, n *network, _ *Client) {
		f := forged{config: config(t, 3)}
		n.forge(t, f)
		switch role {
		case metadata.TARGETS:
			m, err := metadata.Targets().FromBytes(n.overlay["metadata/100.targets.json"])
			if err != nil {
				t.Fatal(err)
			}
			raw := sign(t, n, m, keys...)
			f.snapshot = func(s *metadata.SnapshotType) { s.Meta["targets.json"] = describe(100, raw) }
			n.forge(t, f)
			n.overlay["metadata/100.targets.json"] = raw
		case metadata.SNAPSHOT:
			m, err := metadata.Snapshot().FromBytes(n.overlay["metadata/100.snapshot.json"])
			if err != nil {
				t.Fatal(err)
			}
			raw := sign(t, n, m, keys...)
			f.timestamp = func(s *metadata.TimestampType) { s.Meta["snapshot.json"] = describe(100, raw) }
			n.forge(t, f)
			n.overlay["metadata/100.snapshot.json"] = raw
		default:
			m, err := metadata.Timestamp().FromBytes(n.overlay["metadata/timestamp.json"])
			if err != nil {
				t.Fatal(err)
			}
			n.overlay["metadata/timestamp.json"] = sign(t, n, m, keys...)
		}
	}
}

// signRoot puts a root of the next version, signed by keys, in front.
func signRoot(change func(*metadata.RootType), keys ...string) func(*testing.T, *network, *Client) {
	return func(t *testing.T, n *network, _ *Client) { n.nextRoot(t, change, keys...) }
}

// useRoot has the root keys sign one that nodes have to follow.
func useRoot(change func(*metadata.RootType)) func(*testing.T, *network, *Client) {
	return func(t *testing.T, n *network, _ *Client) {
		n.nextRoot(t, change, "root-1", "root-2")
		n.signed["metadata/2.root.json"] = n.overlay["metadata/2.root.json"]
	}
}

// signatures changes those of a next root that its keys have signed.
func signatures(change func([]metadata.Signature) []metadata.Signature) func(*testing.T, *network, *Client) {
	return func(t *testing.T, n *network, _ *Client) {
		n.nextRoot(t, nil, "root-1", "root-2")
		m, err := metadata.Root().FromBytes(n.overlay["metadata/2.root.json"])
		if err != nil {
			t.Fatal(err)
		}
		m.Signatures = change(m.Signatures)
		if n.overlay["metadata/2.root.json"], err = m.ToBytes(true); err != nil {
			t.Fatal(err)
		}
	}
}

// endless is a body that never ends, and counts what was taken from it.
type endless struct{ read int64 }

func (e *endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	e.read += int64(len(b))
	return len(b), nil
}

func (e *endless) Close() error { return nil }

// endlessBody never ends the file of this name, of which most bytes may be read.
func endlessBody(name string, most int64) attack {
	body := new(endless)
	return attack{name: "endless data/body of " + name, want: ErrTooLarge, online: true, do: func(t *testing.T, n *network, _ *Client) {
		*body = endless{}
		n.forge(t, forged{config: config(t, 3)})
		n.intercept = func(_ *http.Request, asked string) *http.Response {
			if strings.HasSuffix(asked, name) {
				return &http.Response{StatusCode: 200, ContentLength: -1, Body: body}
			}
			return nil
		}
	}, after: func(t *testing.T, _ *network, _ *Client, err error) {
		if body.read == 0 || body.read > 2*(most+1) { // in two tries
			t.Errorf("read %d bytes, want at most %d", body.read, most+1)
		}
		if !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not name it: %v", err)
		}
	}}
}

// unasked fails if what is said to be endless was fetched.
func unasked(name string) func(*testing.T, *network, *Client, error) {
	return func(t *testing.T, n *network, _ *Client, _ error) {
		if last := n.fetched[len(n.fetched)-1]; strings.HasSuffix(last, name) {
			t.Errorf("fetched %s", last)
		}
	}
}

// took fails if the first try was not ended at its bound in time.
func took(want time.Duration) func(*testing.T, *network, *Client, error) {
	return func(t *testing.T, n *network, _ *Client, err error) {
		if d := time.Since(n.begun); d != want {
			t.Errorf("took %v, want %v", d, want)
		}
		if !strings.Contains(err.Error(), "not complete after "+want.String()) {
			t.Errorf("the error does not say why: %v", err)
		}
	}
}

// drip sends a byte a second for ever.
type drip struct{ r *http.Request }

func (d drip) Read(b []byte) (int, error) {
	select {
	case <-time.After(time.Second):
		b[0] = ' '
		return 1, nil
	case <-d.r.Context().Done():
		return 0, d.r.Context().Err()
	}
}

func (d drip) Close() error { return nil }

// rootsWithoutEnd answers each question for a root, after a while.
func (n *network) rootsWithoutEnd(t *testing.T, pause time.Duration) {
	n.intercept = func(r *http.Request, name string) *http.Response {
		var version int64
		if _, err := fmt.Sscanf(name, "metadata/%d.root.json", &version); err != nil {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-r.Context().Done():
			return nil
		}
		n.nextRoot(t, func(s *metadata.RootType) { s.Version = version }, "root-1", "root-2")
		raw := n.overlay["metadata/2.root.json"]
		n.overlay, n.signed[name] = map[string][]byte{}, raw
		return &http.Response{StatusCode: 200, Body: io.NopCloser(bytes.NewReader(raw))}
	}
}

// Each attack ends with the error that names it and the event that tells of it;
// the node has the last good configuration, and unless keys were stolen, not a
// byte on its disk is another; and when the attack ends, so does its effect.
func TestAttacks(t *testing.T) {
	// Each begins at the same time of its bubble, with a copy of one network: to make
	// one takes as long as an attack.
	dir := filepath.Join(t.TempDir(), "first")
	var old []byte // the timestamp of version 1
	synctest.Test(t, func(t *testing.T) {
		n := networkIn(t, dir)
		old = n.file(t, "metadata/timestamp.json")
		n.publish(t, 2)
	})
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				mine := filepath.Join(t.TempDir(), "network")
				if err := os.CopyFS(mine, os.DirFS(dir)); err != nil {
					t.Fatal(err)
				}
				n := networkOf(mine)
				n.old = old
				for _, key := range n.keyFiles("root-1", "root-2", "root-3", "targets", "snapshot", "timestamp") {
					if err := os.Chmod(key, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				a.run(t, n)
			})
		})
	}
}

func (a *attack) run(t *testing.T, n *network) {
	c := n.informed(t)
	a.do(t, n, c)
	before := stateOf(t, c)

	if a.want == nil {
		sees(t, c, a.takes)
		t.Logf("expected: version %d is taken; got: version %d", a.takes, a.takes)
		if a.after != nil {
			a.after(t, n, c, nil)
		}
	} else {
		want := []error{a.want}
		if a.want != ErrUnreachable && a.want != snapshot.ErrInvalid {
			want = append(want, snapshot.ErrUntrusted)
		}
		err := refuses(t, c, want...)
		if a.after != nil {
			a.after(t, n, c, err)
		}
		refuses(t, c, want...) // also when it tries again
		event := ""
		for _, e := range events {
			if e.is == a.want {
				event = e.event.Name
			}
		}
		if got := Event(err); got.Name != event {
			t.Errorf("the journal says %s, want %s", got.Name, event)
		}
		t.Logf("expected: %s; got: %v", event, err)
		if class, _, _ := strings.Cut(a.name, "/"); class == "forms" || class == "hashes" || class == "paths" {
			refuses(t, n.client(t), snapshot.ErrUntrusted) // who has nothing to compare with
		}
		remembers(t, c, 2)
		if !a.online && !a.root && !bytes.Equal(stateOf(t, c), before) {
			t.Error("what the node remembers has changed")
		}
	}

	// The operator mends what the attacker has signed, and goes on.
	for name, raw := range n.signed {
		if err := os.WriteFile(n.dir+"/repository/"+name, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.overlay, n.intercept = map[string][]byte{}, nil
	if a.online || a.root {
		n.rotate(t)
	}
	if a.online {
		n.rotate(t, "timestamp", "snapshot", "targets")
	}
	n.publish(t, 3)
	if a.stuck {
		refuses(t, c, a.want)
		c = n.clientAt(t, c.dir, n.file(t, "metadata/200.root.json"))
	} else {
		sees(t, n.client(t), 3)
	}
	sees(t, c, 3)
}

func stateOf(t *testing.T, c *Client) []byte {
	t.Helper()
	raw, err := os.ReadFile(c.file)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
