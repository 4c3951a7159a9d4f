// Package gate owns the list of conditions between a machine and its jobs: their
// names, their one order, and in general words what opens each.
//
// The rule it keeps: what was not looked at is neither open nor closed.
package gate

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// State is what is known of a gate. The zero value is Closed, so that what
// nobody has opened does not pass.
type State int

// The states, and their words in JSON.
const (
	Closed  State = iota // "closed": not as it has to be
	Open                 // "open"
	Unknown              // "unknown": could not be told, or was not looked at
)

var words = []string{"closed", "open", "unknown"}

// String returns the word.
func (s State) String() string { return words[s] }

// MarshalText implements [encoding.TextMarshaler].
func (s State) MarshalText() ([]byte, error) { return []byte(words[s]), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (s *State) UnmarshalText(b []byte) error {
	i := slices.Index(words, string(b))
	if i < 0 {
		return fmt.Errorf("%.20q is no state of a gate", b)
	}
	*s = State(i)
	return nil
}

// Gate is one condition, looked at. The JSON is part of `resultityctl status
// --json`: fields are added, never changed.
type Gate struct {
	Name    string     `json:"name"`
	Network string     `json:"network,omitempty"` // that it is of; empty for the machine
	State   State      `json:"state"`
	Detail  string     `json:"detail"`           // what is so
	Remedy  string     `json:"remedy,omitempty"` // what opens it, when it is not open
	Since   *time.Time `json:"since,omitempty"`  // of a closed gate: seen closed since then
}

// Names of the gates.
const (
	Account       = "account"
	Linger        = "linger"
	SubIDs        = "subids"
	Cgroup        = "cgroup"
	Podman        = "podman"
	Storage       = "storage"
	Disk          = "disk"
	Clock         = "clock"
	Agent         = "agent"
	Identity      = "identity"
	Registration  = "registration"
	Configuration = "configuration"
	Machine       = "machine"
	Image         = "image"
	Model         = "model"
	Runtime       = "runtime"
	Sandbox       = "sandbox"
	Validation    = "validation"
	Session       = "session"
	Accepting     = "accepting"
	Routable      = "routable"
)

// About is what can be said of a gate without looking.
type About struct {
	Name   string
	Asks   string // the question it answers
	Remedy string // what opens it as a rule; a closed gate knows better
}

// List has all gates, in the order in which they open.
var List = []About{
	{Account, "does the account exist, and is the agent run by it?", "`sudo systemd-sysusers resultity.conf`"},
	{Linger, "does the account's service manager run without a login?", "`sudo loginctl enable-linger resultity`"},
	{SubIDs, "has the account 65,536 subordinate user and group ids?", "`sudo usermod --add-subuids 524288-589823 --add-subgids 524288-589823 resultity` (any free range)"},
	{Cgroup, "is this cgroup v2, and are cpu, memory and pids delegated to the account?", "a drop-in of `user@.service` with `Delegate=cpu memory pids`"},
	{Podman, "does Podman answer, and is it 5.3 or newer?", "`sudo apt install podman crun passt uidmap`"},
	{Storage, "does Podman store images as overlays, with room for more?", "free some space; `driver = \"overlay\"` in `storage.conf`"},
	{Disk, "is there room for what the configuration asks for?", "free some space, or set `paths.state` to a larger disk"},
	{Clock, "does the clock keep the network's time?", "`sudo timedatectl set-ntp true`"},
	{Agent, "does the agent run?", "`sudo systemctl --user -M resultity@ start resultity-agent`"},
	{Identity, "is there a key that nobody else can read?", "`chmod` as the detail says, or the backup of the identity"},
	{Registration, "does the network know the node, for an account?", "a valid token in the file that `network.NAME.enrolment_token` names; `resultityctl bind` for a node that is known and nobody's"},
	{Configuration, "is the network's configuration verified and fresh?", "`network.NAME.url`, `network.NAME.ca` and `network.NAME.root` of `agent.toml`; the machine's clock"},
	{Machine, "may this machine run what the configuration asks for, and has it the memory?", "`runtime.devices`, `runtime.memory_max` and `runtime.device_memory` of `agent.toml`; the network's operator, for a smaller model"},
	{Image, "is the image signed by the network, and stored?", "the network's operator has to sign it"},
	{Model, "are all models here and verified?", "`resultityctl models` shows how far they are"},
	{Runtime, "does the engine run?", "`sudo journalctl _SYSTEMD_USER_UNIT=resultity-runtime.service` has its own words"},
	{Sandbox, "is it sealed, seen from inside and outside?", "remove the drop-in that loosens `resultity-runtime.service`"},
	{Validation, "does the model give the expected answers?", "the network's operator, or a restart of the agent to try again"},
	{Session, "is the node connected to the network?", "that this machine reaches `network.NAME.url`"},
	{Accepting, "does the node want jobs?", "`resultityctl resume`"},
	{Routable, "does the network itself say that it sends jobs here?", "the gates before; else ask the network's operator with the reason it gives"},
}

// Order puts gates into the order of the list. Those that the list does not
// have stay last.
func Order(gs []Gate) {
	at := func(g Gate) int {
		if i := slices.IndexFunc(List, func(a About) bool { return a.Name == g.Name }); i >= 0 {
			return i
		}
		return len(List)
	}
	slices.SortStableFunc(gs, func(a, b Gate) int { return at(a) - at(b) })
}

// FirstClosed returns the first gate that is closed, or nil.
func FirstClosed(gs []Gate) *Gate {
	for i := range gs {
		if gs[i].State == Closed {
			return &gs[i]
		}
	}
	return nil
}

// WriteTable writes the list as a table in Markdown.
func WriteTable(w io.Writer) error {
	var b strings.Builder
	b.WriteString("| gate | asks | as a rule opened by |\n|---|---|---|\n")
	for _, a := range List {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", a.Name, a.Asks, a.Remedy)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
