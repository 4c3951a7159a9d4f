package contract

// ProbeCommand makes the bridge's binary look for a way out instead of being a
// bridge: `resultity-bridge probe TARGET...`. The agent has it executed inside
// the container that runs, so that it sees the network that the engine sees. It
// listens nowhere and starts nothing.
//
// A target is a network and an address as Go's net.Dial takes them, with a
// blank in between: "tcp 192.0.2.1:9", "udp [2001:db8::1]:9", "unix @name". The
// answer on stdout is JSON, a list of [Reach] in the order of the targets.
const ProbeCommand = "probe"

// MaxProbes bounds the targets of one call.
const MaxProbes = 32

// Reach says how the way to a target went.
type Reach struct {
	Target  string `json:"target"`
	Reached bool   `json:"reached"`
	Error   string `json:"error,omitempty"` // why not
}

// LaunchCommand makes the bridge's binary become the engine: the bridge starts
// itself with it, and tells it the rest over a descriptor.
const LaunchCommand = "launch"
