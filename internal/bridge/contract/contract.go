// Package contract is what the agent and the bridge agree upon: the bridge's
// command line, its exit codes, and what it tells about itself. It holds no
// behaviour, so that both sides can import it.
//
// # Start
//
// The bridge is PID 1 of the sealed runtime container. The agent renders its
// command line with [Options.Args] and the bridge reads it with [Parse], which
// takes nothing else. The unit around it must say:
//
//   - Notify=true, so that NOTIFY_SOCKET reaches the bridge;
//   - TimeoutStartSec= above --start-timeout;
//   - WatchdogSec= with the same value as --watchdog (WATCHDOG_USEC is not
//     passed into containers);
//   - a stop time-out of the container of at least --stop-grace and five
//     seconds, and TimeoutStopSec= above that;
//   - RestartPreventExitStatus=77 78, since no restart cures those;
//   - the directory of --socket mounted read-write, alone and not shared with
//     anything else.
//
// NOTIFY_SOCKET is Podman's monitor's, conmon, which passes on READY=1, STOPPING=1,
// WATCHDOG=1 and STATUS= and drops all else that the bridge could want, such as a
// wish for more time. Old ones pass READY=1 and WATCHDOG=1 alone. So nothing rests on
// a status: how far a start is stands there only, but why the bridge gives up, or
// takes its engine for hung, is on stderr as well, which is the unit's journal.
//
// # Order
//
// The bridge inspects its sandbox, and does not start the engine when one
// check differs. It starts the engine, polls --health until it answers 200,
// waits for one completion of one token (the canary), binds --socket with
// mode 0666, and only then says READY=1. From there on it sends WATCHDOG=1
// three times in each --watchdog, but only while the engine is alive.
//
// # Sandbox
//
// What the bridge demands of the container, whatever the command line says: it
// is PID 1, and one process with the same user and group id throughout, neither
// of them 0; both are subordinate ids of the account outside; all capability
// sets are empty, no_new_privs is set, and there is a system call filter. The
// loopback interface is up and no other is, nothing is routed out, and no
// abstract socket of anybody's is in sight. The root is read-only, the kernel's
// interfaces below /proc and /sys are masked or read-only. There are no devices
// but the standard ones and no open descriptors but 0, 1 and 2, the working
// directory is inside the root, and no variable names a proxy.
//
// What it is told: --writable mount points and the socket's directory may be
// writable, and nothing in any other mount may be; --read-only paths must exist
// on read-only mounts; --device names the device nodes that may be there, and
// the sockets and pipes, which are refused in all mounts otherwise.
//
// The engine is started in / with the bridge's environment but for what systemd
// said in it, in a process group of its own, unable to trace the bridge, and
// under one more system call filter. It makes unix, TCP, UDP and route (netlink)
// sockets only, since others are not held by a network namespace, or lead to parts
// of the kernel that no engine needs. It makes no namespaces and no mounts, reaches
// into no other process, sets limits of its own only, and has none of the
// kernel's keys, io_uring, bpf, performance events or userfaultfd. The bridge
// has tried each of these calls before. All processes of the container have the
// bridge's user, no capabilities, no_new_privs and a filter. Where the kernel has Landlock, the
// engine can change files below the --writable paths alone, which leaves out the
// socket's directory, and cannot signal the bridge; [Sandbox] says whether.
//
// Each of the engine's processes may have 65536 descriptors open, and there may be
// 4096 of them with their threads, where nothing else allows fewer.
//
// The engine has a user and a mount namespace of its own, without capabilities, in
// which the directories of --socket and of NOTIFY_SOCKET are covered: it could feed
// the watchdog in the bridge's place, or keep systemd busy. Where no such namespaces
// can be had it is started without; [Sandbox] says so.
//
// # Alive
//
// The engine owes bytes from the moment a request is with it until the answer
// ends, except while the caller is the one who is slow to read. It is hung
// when it has owed them for longer than --stall. Comment lines of an event
// stream do not count as bytes: they come from the engine's HTTP side and say
// nothing about the model. A request that its caller gave up while the engine
// was silent leaves the silence on record until the engine proves itself on
// another one. With no request in flight the engine has to answer a canary
// each --canary-every; only a 200 with a choice in it counts. Canaries never
// overlap, and are not sent while requests are in flight.
//
// What the bytes say is not looked at: an engine that answers garbage is alive
// here, and the agent's to find.
//
// Two consequences for the caller: it must not ask for more than the engine works
// on at once (a request that waits in the engine's own queue receives nothing), so
// that --max-in-flight is that and at most one more, for a request that comes before
// one that was given up is gone; and answers that take long should be streamed.
//
// When the engine is hung the bridge stops its watchdog messages and says why
// in STATUS= and in one line on stderr. systemd does the rest; where it does not,
// as when the engine speaks to it in the bridge's place, the bridge ends itself five
// seconds after systemd should have.
//
// # HTTP
//
// On the socket these are answered, and everything else is 404 with an error
// body in OpenAI's shape. The request target must be exactly this, without a
// query:
//
//	POST /v1/chat/completions   to the engine
//	POST /v1/completions        to the engine
//	POST /v1/embeddings         to the engine
//	GET  /v1/models             to the engine
//	GET  /health                to the engine
//	GET  /metrics               to the engine
//	GET  /.bridge/sandbox       [Sandbox]: the bridge looks around again
//	GET  /.bridge/status        [Status]
//
// A request body is read in full before the engine sees any of it: 413 above
// --max-body, 408 when it takes too long to come, 503 with Retry-After above
// --max-in-flight. Of the headers only Content-Type and Accept go to the
// engine, only Content-Type, Content-Length and Retry-After come back. Answers
// are passed on as they arrive, flushed at each read. An answer that the
// engine cuts short is cut short for the caller too, never ended neatly. An
// engine that does not speak HTTP is a 502. A caller that hangs up ends the
// request at the engine.
//
// # Stop
//
// On SIGTERM or SIGINT the bridge says STOPPING=1, takes no new connection and
// waits up to --stop-grace for the requests in flight (a second signal ends
// the waiting). Then the engine gets SIGTERM, two seconds later a second one,
// two seconds later SIGKILL. An ordered stop ends with exit code 0, however
// the engine took it. An engine that ends by itself ends the bridge at once,
// with the codes below.
package contract

// Version is the version of [Sandbox] and [Status]. A reader refuses others.
const Version = 2

// Exit codes of the bridge.
const (
	// ExitStopped: stopped because it was told to.
	ExitStopped = 0
	// ExitEngine: the engine ended by itself with code 0, or with one of the
	// codes below that are the bridge's own. Any other code of the engine is
	// passed on; an engine that died of signal N is 128+N.
	ExitEngine = 1
	// ExitNotReady: the engine did not answer within --start-timeout.
	ExitNotReady = 69
	// ExitInternal: the bridge itself failed, for example to bind its socket.
	ExitInternal = 70
	// ExitSandbox: the sandbox is not the one that was ordered. The engine
	// was not started.
	ExitSandbox = 77
	// ExitConfig: the command line is wrong, names an engine that cannot be
	// executed, or a socket path that holds something else. The engine was
	// not started.
	ExitConfig = 78
)

// Paths of the bridge's own answers on the socket.
const (
	SandboxPath = "/.bridge/sandbox"
	StatusPath  = "/.bridge/status"
)

// Sandbox is what the bridge found when it looked around. It does so before it
// starts the engine, and whenever it is asked over the socket. It is complete also
// when OK is false; before the engine's start nobody can ask for it then: the failed
// checks are on stderr, and the first of them in the unit's status. Beside a running engine, sockets and
// pipes count only where the engine could not have made them, and its terminals
// are no devices.
type Sandbox struct {
	Version int     `json:"version"`
	OK      bool    `json:"ok"`     // every check is
	Checks  []Check `json:"checks"` // always all of them, in a fixed order

	// What follows is not judged here. The agent compares it with what it sees
	// from outside.

	UID        int               `json:"uid"` // inside
	GID        int               `json:"gid"`
	Groups     []int             `json:"groups"`
	UIDMap     []IDRange         `json:"uidMap"`
	GIDMap     []IDRange         `json:"gidMap"`
	Namespaces map[string]string `json:"namespaces"` // "net" to "net:[4026532000]", and so on
	Label      string            `json:"label"`      // of the security module, "" without one
	Landlock   int               `json:"landlock"`   // version that the engine is confined with; 0: the kernel has none, or too old a one
	Hidden     bool              `json:"hidden"`     // the engine does not see the sockets of the agent and of systemd
	Cgroup     string            `json:"cgroup"`     // path in the unified hierarchy as it is seen inside, "" without one
	Interfaces []Interface       `json:"interfaces"` // of the network
	Devices    []Device          `json:"devices"`    // nodes, at most [MaxDevices] of them
	Mounts     []Mount           `json:"mounts"`     // all, in the kernel's order
}

// MaxDevices bounds Sandbox.Devices.
const MaxDevices = 256

// Interface is one of the network's.
type Interface struct {
	Name      string   `json:"name"`
	Up        bool     `json:"up"`
	Loopback  bool     `json:"loopback"`
	Addresses []string `json:"addresses"`
}

// Device is a device node.
type Device struct {
	Path  string `json:"path"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

// Check is one thing that the sandbox must be.
type Check struct {
	Name string `json:"name"` // fixed, or "read-only PATH"
	Want string `json:"want"`
	Got  string `json:"got"`
	OK   bool   `json:"ok"`
}

// IDRange is one line of /proc/self/uid_map: Size ids from Inside on are those
// from Outside on in the user namespace around this one.
type IDRange struct {
	Inside  uint32 `json:"inside"`
	Outside uint32 `json:"outside"`
	Size    uint32 `json:"size"`
}

// Mount is one mount of the container, without what it says about the host's
// paths.
type Mount struct {
	Point    string `json:"point"`
	Type     string `json:"type"` // of file system
	ReadOnly bool   `json:"readOnly"`
	Allowed  bool   `json:"allowed"` // may be writable: a --writable path or the socket's directory
	// Writable lists what this user could write below Point although the mount
	// is not on the list of those that may be written; at most a few.
	Writable []string `json:"writable,omitempty"`
}

// State is what the bridge is doing.
type State string

// The states that can be seen over the socket. It is bound only once the
// engine has answered.
const (
	Serving State = "serving"
	Hung    State = "hung" // no watchdog messages are being sent
)

// Status is a moment's account of the bridge. Counters run since its start.
type Status struct {
	Version  int    `json:"version"`
	State    State  `json:"state"`
	Reason   string `json:"reason,omitempty"` // why the engine counts as hung
	Model    string `json:"model"`
	StartMS  int64  `json:"startMs"`  // from the engine's start to its first completion
	InFlight int    `json:"inFlight"` // requests with the engine, canaries not counted
	SilentMS int64  `json:"silentMs"` // how long the engine has owed bytes; 0 when it owes none
	ProofMS  int64  `json:"proofMs"`  // since it last proved alive

	Answered uint64 `json:"answered"` // requests answered in full by the engine, whatever its status code
	Failed   uint64 `json:"failed"`   // cut short, garbled or refused by the engine
	Canceled uint64 `json:"canceled"` // given up by the caller
	Busy     uint64 `json:"busy"`     // 503 because of --max-in-flight
	Canaries uint64 `json:"canaries"` // answered
	Withheld uint64 `json:"withheld"` // watchdog messages not sent because the engine was hung
}
