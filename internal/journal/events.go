package journal

//go:generate go run ./catalog ../../units ../../README.md

import (
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"strings"
)

// Event is something that an operator may want to look up: it has an entry in
// the journal's catalog (journalctl -x), generated from this list.
type Event struct {
	ID      string // MESSAGE_ID: 32 hexadecimal digits, for ever
	Name    string
	Subject string // what happened, in one line
	Text    string // why it matters and what to do; @FIELD@ is replaced by the journal
}

// Attr makes the event part of a record.
func (e *Event) Attr() slog.Attr { return slog.Any("event", e) }

// The events. An identifier is for ever: take one that was never here, such as
// what systemd-id128 new prints, and give a removed one to nothing else. The
// tests refuse one that is here twice.
var (
	AgentReady         = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f01", "agent-ready", "The agent runs", "The agent has opened its store and its control socket. Whether the node gets jobs is another question: `resultityctl status` answers it.")
	AgentStopping      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f02", "agent-stopping", "The agent stops", "No new jobs are taken; running ones are finished within the unit's stop time. Results that the network has not acknowledged are kept and sent at the next start.")
	ConfigInvalid      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f03", "config-invalid", "The configuration file cannot be used", "The message names the file, the key and what was expected. The agent ends with status 78 and is not restarted: mend the file, then `systemctl --user restart resultity-agent`.")
	IdentityCreated    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f04", "identity-created", "A new node identity was made", "The node had no key, so one was made. Its address is the node's name in the network: @RESULTITY_NODE@. Back up the identity directory; whoever has it is this node.")
	IdentityRefused    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f05", "identity-refused", "The node's key cannot be used", "Either its file may be read or written by others, or it belongs to somebody else, or the passphrase does not open it. The message says which. Nothing is changed; the agent ends with status 78.")
	Registered         = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f06", "registered", "The node is registered", "The network @RESULTITY_NETWORK@ knows this node now, for account @RESULTITY_ACCOUNT@. This happens once.")
	RegisterRefused    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f07", "register-refused", "The network refused the registration", "Usually the enrolment token is missing, used up or expired. Get a new one from the network's operator, put it into the file that network.NAME.enrolment_token names, and restart the agent.")
	RegisterFailed     = event("e7d86a14bf0b54dcec18ffab17ba14dd", "register-failed", "The node could not register", "The network did not answer the registration, or what it answered could not be written down; the message has the cause. The agent tries again by itself. A registration that the network does not take is another event (register-refused).")
	SnapshotVerified   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f08", "snapshot-verified", "A new configuration was verified", "The network's configuration version @RESULTITY_VERSION@ carries enough valid signatures and is newer than the last. It is applied next.")
	SnapshotRefused    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f09", "snapshot-refused", "A configuration was refused", "It is another network's (a network's name and network.NAME.url in agent.toml have to belong together), or what this node keeps of it is damaged or cannot be written. The message says which. The node goes on with the last good one.")
	SnapshotUnsigned   = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e01", "snapshot-unsigned-refused", "A configuration is not signed as it must be", "What the network serves for the file in the message does not carry enough valid signatures of the keys that the trusted root names. It had no effect, and the node goes on with the last good configuration. Somebody on the way or at the server may be offering something of their own: check that network.NAME.url and network.NAME.root are this network's, then tell the network's operator.")
	SnapshotRollback   = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e02", "snapshot-rollback-refused", "An older configuration than the last was refused", "What the network serves is older than what this node has verified before. Somebody plays back old files, or the network's operator has restored a backup. It had no effect, and the node goes on with the last good configuration. Tell the network's operator: after a restore, new online keys make nodes take the older versions.")
	SnapshotFrozen     = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e03", "snapshot-expired-refused", "An expired configuration was refused", "What the network serves was signed long ago and has run out. Either this machine's clock is ahead (timedatectl set-ntp true), or the network's operator has not renewed it, or somebody holds newer files back. The node goes on with the last good configuration.")
	SnapshotMixed      = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e04", "snapshot-mixed-refused", "Files of different configurations were refused", "The bytes of the file in the message are not those that the network's signed metadata names. A cache on the way may have kept an old file, or somebody exchanges them. It had no effect; the agent tries again. If it persists, look at proxies between this machine and network.NAME.url, then tell the network's operator.")
	SnapshotRoot       = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e05", "snapshot-root-refused", "A change of the network's root keys was refused", "The next root is signed, and does not follow the one that this node trusts: it is of another version, or of a repository that nodes do not follow. It had no effect, and the node goes on with the last good configuration. Only the network's operator can mend it, with the holders of its keys.")
	SnapshotMalformed  = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e06", "snapshot-malformed-refused", "The network's metadata cannot be read", "The file in the message has not the form of TUF metadata, or one that this agent does not take. A web page in its place is often a captive portal's or a proxy's: check that this machine reaches network.NAME.url. If it is new for this agent, upgrade it; else tell the network's operator. The node goes on with the last good configuration.")
	SnapshotTooLarge   = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e07", "snapshot-oversize-refused", "The network sends more data than there may be", "Reading was ended at the bound that the message names. It had no effect, and the node goes on with the last good configuration. If the message speaks of roots, a newer package is needed; else check that network.NAME.url is this network's, then tell its operator.")
	SnapshotRedirected = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e08", "snapshot-redirect-refused", "The network's server sends this node elsewhere", "The redirect leads to no https address, or in a circle, and was not followed. The node goes on with the last good configuration. Check network.NAME.url; behind it, the network's operator has to look.")
	SnapshotUnusable   = event("1d5a3c0e9f6b4b7e8a21c64f0b9d3e09", "snapshot-unusable-refused", "The configuration cannot be used by this agent", "It is signed as it must be and asks for something that this agent does not know, or that is out of bounds; the message names it. The node goes on with the last good one. Upgrade the agent; if it is the newest, tell the network's operator.")
	SnapshotFiles      = event("f0e95a6bbf0b45b1a7c6a20f04d9c1de", "snapshot-files-refused", "A configuration lists files that a model may not have", "Only files that engines read as data are taken: gguf, safetensors, and the texts and JSON beside them. Pickles (.bin, .pt, .pth, .ckpt, .pkl), Python and other programs can run code when they are loaded; the message names the file. Nothing was fetched, and the node goes on with the last good configuration. Only the network's operator can mend it, with the model in another format.")
	SnapshotStale      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f0a", "snapshot-stale", "The network's configuration cannot be fetched", "The node goes on with the last verified configuration. Check the network connection and network.NAME.url; the message has the cause.")
	SnapshotExpired    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f77", "snapshot-expired", "The configuration has expired", "The network has not confirmed it for so long that the last confirmation has run out. The node goes on with it, since it was right when it was verified, and takes up a newer one as soon as the network can be reached. Check the network connection, and this machine's clock.")
	ImageReady         = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f0b", "image-ready", "The runtime image is verified and stored", "Its signature was checked before the pull by the agent and during it by Podman's policy.")
	ImageRefused       = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f0c", "image-refused", "The runtime image was refused by Podman", "Podman's policy does not let the image in, though the agent found it to be signed. It was not run. The message has Podman's words. Usually the image has only a signature that Podman cannot read, or is an index whose images are not signed: see policy/README.md. The network's operator has to sign it.")
	ModelReady         = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f0d", "model-ready", "A model is complete and verified", "Every byte of @RESULTITY_MODEL@ was hashed while it arrived and matches the configuration.")
	ModelRefused       = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f0e", "model-refused", "A model's bytes are wrong", "A source delivered something that does not match the configuration's hash. The bytes were thrown away and never got their final name. Other sources are tried; if all fail the same way, the network's operator has to look.")
	ModelFailed        = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f0f", "model-failed", "A model could not be fetched", "The message has the cause: no source answers, the disk is full, or the directory is not writable. The agent tries again; what arrived is kept and resumed.")
	RuntimeStarting    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f10", "runtime-starting", "The runtime is being started", "The unit was written and systemd asked to start it.")
	RuntimeActive      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f11", "runtime-active", "The runtime is active", "Started, sealed as required, and its validation requests have given the expected answers. The node takes jobs.")
	RuntimeLost        = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f12", "runtime-lost", "The runtime ended or hung", "systemd restarts it. Until it is validated again the node takes no jobs; jobs that ran move to other nodes. The unit's own messages say why: journalctl _SYSTEMD_USER_UNIT=resultity-runtime.service")
	RuntimeFailed      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f13", "runtime-failed", "The runtime could not be brought up", "The message has the cause: an unsound unit, a start that timed out, an engine that ended. The agent goes back to the last good deployment where there is one, and tries this one again only when the configuration changes or after a pause.")
	SandboxRefused     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f14", "sandbox-refused", "The runtime is not sealed as it must be", "The effective state of the container, seen from inside or outside, differs from the rules. The engine was not used. The message names each difference.")
	SandboxDrifted     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fc8", "sandbox-drifted", "The sandbox has changed under the runtime", "The runtime was sealed when it was started, and is not what it was any more: the message says what is different. Only who is root on this machine, or in the agent's account, can have done that. The runtime was stopped without waiting for its jobs, which other nodes do again, and is started anew. Find out who it was: `sudo journalctl --since -1h` and `last`. If that happens again and again, take the node out of service with `resultityctl drain`.")
	SandboxRecorded    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fc9", "sandbox-recorded", "The runtime's sandbox is on record", "What was seen of the container from inside and from outside was signed. Receipts of jobs that begin from now on name this record, and `resultityctl verify RECEIPT --sandbox FILE` shows it.")
	SandboxUnrecorded  = event("79113d66225455761c3c19c9ec5d61cc", "sandbox-record-failed", "The sandbox could not be put on record", "What was seen of the container is as it must be, but was not signed or not written down; the message has the cause. As receipts name the record, the node takes no jobs without one. Look at `systemctl status resultity-signer` and at the disk of the state directory. The agent tries again.")
	ValidationFailed   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f15", "validation-failed", "The model gave a wrong answer", "A validation request of the configuration did not give the answer that the configuration expects, so this deployment does not become active, or is taken out of service. Text is never logged; the message says where the answer leaves the expected one.")
	Validated          = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f9a", "validated", "The model gave the expected answers on schedule", "The golden requests of the configuration were repeated beside jobs, at the interval that the configuration gives.")
	ClassUnknown       = event("53f84479d3725cecd42f9e50cf4fc195", "class-unknown", "The runtime is in no determinism class", "The agent cannot name something of this machine that changes what an engine computes; the message says what. Jobs are done all the same, but the answers can be compared with no other node's, and `resultityctl replay` can tell of none whether it is the same.")
	NotValidated       = event("cccaf9b56cb54f72a4afe078d086a52a", "not-validated", "A validation was put off, or has decided nothing", "The reason: @RESULTITY_REASON@. The deployment stays what it was. Where answers were wrong beside other requests only, that is not held against it: engines compute requests in batches, and a close call between two tokens may fall the other way in company. A network whose nodes are shared does better with golden requests that allow for it (answers, share or pattern in its configuration). It is tried again by itself.")
	ValidationDoubted  = event("da192af37d45404394fb7d574d653766", "validation-doubted", "An answer was wrong while the engine had other requests, too", "It is asked for again while the engine does nothing else, and only what is wrong then counts. If this comes often, the network's golden requests are close calls: its operator should allow for them.")
	SessionOpened      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f16", "session-opened", "Connected to the network", "The session is authenticated in both directions.")
	SessionClosed      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f17", "session-closed", "The connection to the network ended", "The agent connects again by itself, waiting longer each time. Accepted jobs go on; their results are kept until they can be delivered.")
	SessionRefused     = event("e8bb612962d0934440820d09a3ad7203", "session-refused", "The network does not let this node in", "It answered the request for a session with a refusal, or ended the session for what this node sent. Reason @RESULTITY_REASON@, of: not_registered (it does not know the node: its operator has removed it, or the key is another one), wrong_network (network.NAME.url is of a network of another name), protocol (what answers at network.NAME.url is no network of this protocol, or one of another version), blamed (it found a frame of this node to be wrong), refused (its words are in the message). The agent tries again.")
	FrameRefused       = event("1dca9c9356a845380fdf417f2549f6bd", "frame-refused", "What the network sent was refused", "The session was ended, nothing of the message had an effect, and the agent connects again. Reason @RESULTITY_REASON@, of: too_large (more than there may be in a frame), signer (its first frame is by no key of the configuration), tag (changed on its way, or not of this session), sequence (repeated, lost or out of order), malformed (not as the protocol spells it), order (not the time for this message). Once may be a fault on the way. If it does not end, somebody between this machine and the network alters what is sent, or the network is not who it says: tell its operator.")
	Routable           = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f18", "routable", "The network sends jobs to this node", "All gates are open.")
	NotRoutable        = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f19", "not-routable", "The network sends no jobs to this node", "The network gave the reason: @RESULTITY_REASON@")
	JobDone            = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f1a", "job-done", "A job was finished", "Its result and receipt are stored and will be sent until the network acknowledges them.")
	JobFailed          = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f1b", "job-failed", "A job failed", "The network was told, with code @RESULTITY_CODE@, and may give the job to another node.")
	JobRefused         = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f1c", "job-refused", "A job was refused", "Code @RESULTITY_CODE@. A refused job leaves no trace on the node.")
	JobReplayed        = event("083f8c5d087384bc12eac6f8dc4a9a8e", "job-replayed", "A request was run again for the operator", "The outcome, @RESULTITY_OUTCOME@, says whether the answer is the same as before. No receipt came of it. If it is different: an engine that computes in another order when it is busy may rightly answer otherwise; see `resultityctl replay --help`.")
	Draining           = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f1d", "draining", "The node takes no new jobs", "Asked for by the operator; `resultityctl resume` ends it.")
	Resumed            = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f1e", "resumed", "The node takes jobs again", "Asked for by the operator.")
	StorageFailed      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f1f", "storage-failed", "The store cannot be written", "The disk is full or read-only. New jobs are refused until it can be written again; nothing accepted is lost. Free some space: df -h on the state directory.")
	ResultDamaged      = event("9567492a7e7744819bffc2f72cf57932", "result-damaged", "A result cannot be read from the disk", "What the disk gives back of the result of job @RESULTITY_JOB@ is not what was written, or it gives back nothing. The network does not get this result: until the job's deadline it gives the job to another node, and after that its client gets none. All other results are delivered. What is left of it stays on the disk until the configuration's result_ttl is over. The store has to be replaced, since its next start refuses it (store-refused): `resultityctl drain`, wait until `resultityctl jobs` shows none but unreadable and kept ones, stop the agent and move the store away. The disk or the memory of this machine is failing: look at `smartctl -a` and the kernel's log.")
	ClockWrong         = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f20", "clock-wrong", "This machine's clock and the network's differ too much", "Frames outside of the protocol's window are refused, since they could be replays. Turn on time synchronisation: timedatectl set-ntp true")
	ImageFailed        = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f21", "image-failed", "The runtime image could not be had", "The message has the cause: Podman or the registry does not answer, or the disk is full. Nothing is known to be wrong with the image. The agent tries again; a deployment that is up goes on.")
	StoreRefused       = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f22", "store-refused", "The job store cannot be used", "The message says what is wrong with it: it is damaged, or another version of the agent wrote it. Nothing is changed; the agent ends with status 78. Move the file away to begin a new one: results that the network had not acknowledged are lost with it, the identity is not.")
	AgentFailed        = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f23", "agent-failed", "The agent ended with an error", "The message has the cause. systemd starts the agent again, waiting longer each time; accepted jobs and results are kept. If it persists, the cause is on this machine.")
	LandlockMissing    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f70", "landlock-missing", "The engine can fill the runtime directory", "This kernel has no Landlock of version 2, and gives the container no user namespaces: by one or the other the engine is kept from writing beside its socket. Everything else is sealed, and the node takes jobs. Use a kernel of 5.19 or later with landlock among the values of its lsm= parameter (see /sys/kernel/security/lsm), or allow user namespaces (user.max_user_namespaces).")
	MemoryRefused      = event("8a4e2d17c60b4f95b3d8e1a97c52f601", "memory-refused", "The configuration's model is too large for this machine", "The message has what it needs and what there is. Nothing was fetched, and what ran before goes on. Where the configuration states no memory_bytes, it is the size of the model's weights alone that is compared: with `runtime.memory_max` of agent.toml (by default all of the machine's memory but a tenth, at most 1 GiB), and where layers go to a device, with that and the device's memory together, as far as it is known. Raise what the runtime may have and restart the agent, or ask the network's operator for a smaller model.")
	DeviceRefused      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f71", "device-refused", "The configuration orders a device that this node does not give away", "The message names it. Nothing was fetched, and what ran before goes on. To give it away, add it to devices in [runtime] of agent.toml and restart the agent; else ask the network's operator for a configuration without it.")
	MemoryUnlimited    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f72", "memory-unlimited", "The runtime's memory has no ceiling", "The memory controller is not delegated to this account, so that runtime.memory_max of agent.toml has no effect: an engine that leaks memory can take the machine along. systemd delegates it to all users by default where control groups are unified; see Delegate= of user@.service and `podman info`.")
	RuntimeSuspect     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f74", "runtime-suspect", "The engine fails job after job", "It answers what its API does not promise, or does not come to an end; the message has what it was last. The node takes no jobs until the runtime has given the expected answers to the validation requests again. If it does not, or fails again within ten minutes, it is restarted; each further time, after a longer pause.")
	RuntimeReplaced    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f75", "runtime-replaced", "The agent has the runtime restarted", "The message has the reason. The container is stopped, started from the verified image and model, and validated before it gets jobs.")
	RuntimeStorm       = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f76", "runtime-storm", "The runtime ends again and again", "It used up its starts, so systemd starts it no more. The agent tries again after five minutes, and then after longer ones, up to an hour; at once with a new configuration, or with `resultityctl restart`. The engine says why it ends: journalctl _SYSTEMD_USER_UNIT=resultity-runtime.service")
	MemoryExceeded     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f73", "memory-exceeded", "The runtime wanted more memory than it may have", "The kernel ended it, and systemd starts it again. Until it is validated the node takes no jobs; jobs that ran move to other nodes. If it happens often, the network's configuration asks for more than this machine has, or runtime.memory_max of agent.toml is too low.")
)

// Sources and files of models.
var (
	ModelsShared      = event("868fb270aa4fd186d33f4dcb1ddcbdd1", "models-shared", "Models are given to neighbours", "The agent listens at the address in the message, as models.serve of agent.toml says, and gives verified files of models to machines nearby that ask for them by their hash. `resultityctl metrics` counts what is given.")
	ModelShareFailed  = event("3fd38e3692f40c0e3e43c35807fe9886", "model-share-failed", "Models cannot be given to neighbours", "The agent cannot listen at the address that models.serve of agent.toml names: this machine does not have it, or not yet, or another program has the port. It is tried again, and the node's jobs do not depend on it. Look at `ip address` and `ss -tlnp`.")
	ModelShareCrowded = event("059d9e23d8578a88533a350087d1f809", "model-share-crowded", "Neighbours were refused connections", "More machines, or more connections of one, asked for models than are answered at once; or somebody from outside of this network did, which is never answered. The message has how many were refused since the last such record, and the address of the last. Neighbours ask again by themselves, or fetch from elsewhere. If one address does not stop, look at that machine, or take models.serve out of agent.toml.")
	ModelSourceFailed = event("3d0e8a51c2b94f6e9a7785f4d10c2b01", "model-source-failed", "A source of a model failed", "The message has the source and the cause. The others go on, and this one is asked again later, ever less often. A file that no source brings is another event (model-failed).")
	ModelCode         = event("b03d7b2effeb4f2ea304c2e97370c255", "model-code-refused", "A model asks for code to be run", "One of its files would have the engine run code that comes with the model or from elsewhere, as auto_map and trust_remote_code do; the message names it. It was not given to an engine, and the node goes on with the last good configuration. Only the network's operator can mend it, with another model. Ask who made this one.")
	ModelFormat       = event("85d08572367f43eea7e23c792e579735", "model-format-refused", "A file of a model is not what its name says", "It is a file of the configuration, byte for byte, but its header is damaged or out of bounds, its tensors are not where that says, or it is of another format, such as a pickle; the message says which. It was not given to an engine, and the node goes on with the last good configuration. Only the network's operator can mend it, with another model.")
	ModelParts        = event("0ad451beebd2405f9f694f0d727a0b12", "model-parts-refused", "The parts of a model do not belong together", "A part of it is missing, or is one of another model, or its index names files that are not there; the message says which. It was not given to an engine, and the node goes on with the last good configuration. Only the network's operator can mend it, by listing all parts.")
	ModelSigner       = event("f24b1cac3485412a8a10155708e8e700", "model-signer-refused", "A model is signed by somebody else", "The configuration asks for a signature, and the one that comes with the model is by none of the keys that it names. It was not given to an engine, and the node goes on with the last good configuration. The network's operator has to have it signed by one of them, or to name who has signed it.")
	ModelSignature    = event("4d97635e7f17483ba03e53518c4b24ca", "model-signature-refused", "The signature of a model is not one of it", "The signature that comes with the model is of other files than the configuration's, is a statement of another kind, or cannot be read; the message says which. The model was not given to an engine, and the node goes on with the last good configuration. The network's operator has to have the model signed as it is.")
	ModelSpace        = event("d26799d197cc4cc4bdfe50be635e7172", "model-space-refused", "A model does not fit on this disk", "The message has what is still to be written and what is free for it. Nothing more was fetched, and what ran before goes on. Free some space on the file system of the state directory; the agent tries again by itself.")
	ModelDamaged      = event("3d0e8a51c2b94f6e9a7785f4d10c2b04", "model-damaged", "A model file is damaged on disk", "A byte of it is not what was verified when it was fetched, or cannot be read any more. The node stops using the model at once, fetches what is damaged anew, chunk by chunk, and takes jobs again when the validation requests have given the expected answers. Nothing is to be done the first time; if it happens again, this disk or the memory of this machine is failing: look at `smartctl -a` and the kernel's log.")
	ScrubDone         = event("3d0e8a51c2b94f6e9a7785f4d10c2b05", "scrub-done", "The models on disk were read again", "Done weekly, at the lowest priority (resultity-scrub.timer). The message has how much was read, and how many files are damaged; each of those is an event of its own (model-damaged).")
	ScrubFailed       = event("3d0e8a51c2b94f6e9a7785f4d10c2b06", "scrub-failed", "The models on disk could not be scrubbed", "The message has the cause: a file cannot be opened, or the agent does not run and cannot be told of damage. Start it, then `systemctl --user start resultity-scrub`; the timer does so within a week.")
	ModelSourceWrong  = event("3d0e8a51c2b94f6e9a7785f4d10c2b02", "model-source-wrong", "A source of a model sent wrong bytes", "A chunk from @RESULTITY_SOURCE@ has another hash than the configuration says. It was thrown away before it was written, and the source is not asked again for this file. If it is a neighbour (models.neighbours of agent.toml), that machine is broken or hostile; else tell the network's operator.")
)

// Why an image may not run. Each is an error of package image.
var (
	ImageUnsigned   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb0", "image-unsigned-refused", "The runtime image is signed by nobody", "The registry has no signature of the image, or none that says it may be run. It was not fetched. The network's operator has to sign this digest: `cosign sign --key cosign.key --tlog-upload=false REPOSITORY@sha256:…`.")
	ImageSigner     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb1", "image-signer-refused", "The runtime image is signed by somebody else", "There are signatures, but none by a key or an identity of the configuration's image_trust. It was not fetched. The network's operator has to have it signed by one of them, or to publish a configuration that names who signed.")
	ImageExpired    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb2", "image-expired-refused", "The signer of the runtime image had no good certificate", "A log saw the keyless signature when its certificate was not good, or not any more. The image was not fetched. The network's operator has to have it signed again.")
	ImageRevoked    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb3", "image-revoked-refused", "The network has taken back its trust in who signed the runtime image", "The newest configuration does not name the key or identity any more that signed this image, and nobody else has. It is not started again, and was stopped if it ran. Nothing is to be done here: the network's operator publishes another image, or has this one signed by somebody who is trusted.")
	ImageDigest     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb4", "image-digest-refused", "A signature beside the runtime image is of another image", "Somebody put a signature of something else beside it. The image was not fetched. The network's operator has to sign this digest, and to look at who may write to the registry.")
	ImageRepository = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb5", "image-repository-refused", "The runtime image is signed for another repository", "Copying an image does not copy the trust in it. It was not fetched. The network's operator has to sign it where the configuration has it.")
	ImageBytes      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb6", "image-bytes-refused", "The registry answers other bytes than were asked for", "What it sent does not have the digest of the configuration, and was not used. The network's operator has to push the image again; or look at what stands between here and the registry.")
	ImageManifest   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb7", "image-manifest-refused", "The manifest of the runtime image cannot be used", "It is of an old kind, has parts that this agent does not know, or can be read in two ways; the message says which. The image was not fetched. The network's operator has to push it again, as cosign and Podman take it.")
	ImagePlatform   = event("5e85d5a28cb04cb9a41f92373ba2cffa", "image-platform-refused", "The runtime image is not for this machine", "It is an index of images, none of which is for this machine's processor and system. Nothing was fetched. The network's operator has to add one for it, or this machine cannot take part in that network.")
	ImageOversize   = event("77b1bf9d6c604c27b7f899de1b5ef6b1", "image-oversize-refused", "The registry sends more about the runtime image than is read", "Reading its manifest or its signatures was ended at the bound that the message names. The image was not fetched. Somebody may have put much beside it: the network's operator has to look at who may write to the registry, and to remove what does not belong there.")
	ImageKeys       = event("60c2e042b7ad437fad5b4e36628f7dd8", "image-keys-refused", "The keys for runtime images cannot be used", "One of the keys or identities in the configuration's image_trust is not of a kind that this agent can check with, or none is left. No image was asked for. If it is new for this agent, upgrade it; else the network's operator has to publish a configuration with usable ones.")
	ImageOther      = event("cfb81fe562364c3a8f3bdf7e0e73a36c", "image-other-refused", "Podman has stored another image than it was asked for", "What is stored under the runtime image's name has not the digest of the configuration. It was not run. Look at who else works with Podman in this account; the agent fetches the image again.")
	ImageChecked    = event("06217d7bedba73ab6660c56dc4a30390", "image-checked", "The stored runtime image was read again", "Podman has compared all of it with what was pulled, and found no difference. Done after the agent's start and after each scrub (resultity-scrub.timer), at the lowest priority. Damage is another event (image-altered-refused).")
	ImageAltered    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3fb8", "image-altered-refused", "The stored runtime image is not what was pulled", "A file of it has other content, or there is one more or one less. It is not started, or stopped if it runs; it is removed and fetched again by itself. If that happens again, look at this machine's disk, and at who else works in this account.")
)

// The network's orders, and logs.
var (
	OrderDrain      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f40", "order-drain", "The network has drained this node", "The network ordered this node to take no new jobs: @RESULTITY_REASON@. Running jobs are finished. Only the network takes this back, by an order to resume; a restart of the agent does not. A drain of your own (`resultityctl drain`) is another matter and stays whatever the network orders.")
	OrderResume     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f41", "order-resume", "The network has taken back its drain", "The node takes jobs again, unless its operator has drained it: then `resultityctl resume` is needed, too.")
	OrderRestart    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f42", "order-restart", "The network ordered a restart of the runtime", "The reason given: @RESULTITY_REASON@. Running jobs are finished, the runtime is started anew and validated. Nothing is to be done.")
	OrderRevalidate = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f43", "order-revalidate", "The network ordered a validation of the model", "The reason given: @RESULTITY_REASON@. Every file is hashed again while the node serves, then the golden requests are repeated. If something is wrong, the node is out of service until it has been mended: a damaged file is fetched again.")
	OrderLogs       = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f44", "order-logs", "The network asked for this node's log", "What the spool has gained since the last upload is sent now, unless log.upload is \"off\".")
	OrderShutdown   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f45", "order-shutdown", "The network ordered this node to shut down", "The reason given: @RESULTITY_REASON@. Running jobs are finished, the runtime is stopped and the agent ends with status 0, so that systemd leaves it at that. To begin again: systemctl --user start resultity-agent (or a reboot). Ask the network's operator before.")
	OrderPenalty    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f46", "order-penalty", "The network has penalised this node", "Until @RESULTITY_UNTIL@, because: @RESULTITY_REASON@. The node goes on; the network gives it fewer jobs or none. Mend what the reason names; if it names nothing that you know of, ask the network's operator. `resultityctl status` shows the penalty until it ends.")
	OrderDone       = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f47", "order-done", "An order of the network was carried out", "The network is told until it has acknowledged this.")
	OrderFailed     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f48", "order-failed", "An order of the network could not be carried out", "The message has the cause. The network is told and may give the order again; the node does not repeat it by itself.")
	OrderRefused    = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f49", "order-refused", "An order of the network was refused", "The message says why: it is not signed by a key of the network's configuration, is for another node, has expired (check this machine's clock), or asks for something that this agent does not know (upgrade it). It had no effect.")
)

// The binding to an account.
var (
	Bound   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f90", "bound", "The node is bound to an account", "The network has it as a node of account @RESULTITY_ACCOUNT@ now, by @RESULTITY_METHOD@. `resultityctl identity` shows it. If that is not yours: `resultityctl unbind`.")
	Unbound = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f91", "unbound", "The node is bound to no account", "It was a node of account @RESULTITY_ACCOUNT@ until its owner, its operator or the network's operator ended that. It stays connected and gets no jobs. To bind it again: `resultityctl bind --wallet 0x…`, `--email name@domain` or `--token FILE`.")
)

// LogsDropped is about the logs themselves.
var LogsDropped = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f4a", "logs-dropped", "Log records never reached the network", "The spool is bounded, and @RESULTITY_COUNT@ of its records were overwritten before the network had them, since it was away for long or the disk was full. The journal still has them. The network knows the number.")

// The log of the node's receipts.
var (
	ReceiptLogRestored = event("5e0c7a41d2b84f3c9a6e1b70f4d8a901", "receipt-log-restored", "The receipt log goes on from the network's copy", "This node's log of its receipts was shorter than the network's, or another one: its disk was replaced or set back. The network's copy of @RESULTITY_COUNT@ receipts has this node's signature, so the node goes on from that. If nobody replaced or restored this machine's disk, another machine may use its key.")
	ReceiptLogRefused  = event("5e0c7a41d2b84f3c9a6e1b70f4d8a902", "receipt-log-refused", "The network's copy of the receipt log is not this node's", "What the network says it has of this node's log of receipts was not signed by this node, or does not lead to what was. The node shows it nothing of the log in this session; jobs go on, but none of their receipts can be proven to be in the log. Tell the network's operator.")
	ReceiptLogBehind   = event("5e0c7a41d2b84f3c9a6e1b70f4d8a903", "receipt-log-behind", "The receipt log is behind what the key has signed", "The node's key has signed a log with which the @RESULTITY_COUNT@ receipts that the node has do not begin: the disk was replaced or set back before the network had the last ones. Jobs go on. The key signs no other log, since the two would contradict each other, so that new receipts cannot be proven. Ask the network's operator to have the log begin anew (`resultity-network nodes reset-log`); the node needs nothing done.")
	ReceiptLogLost     = event("5e0c7a41d2b84f3c9a6e1b70f4d8a904", "receipt-log-lost", "Node and network have both lost receipts of the log", "The network says that it has lost its copy of this node's receipt log, of which this node's key has signed @RESULTITY_COUNT@ receipts, and this node's disk has not got them either: it was replaced or set back, too. The node signs nothing of the log in this session, since that would contradict what it has signed. Jobs go on, but none of their receipts can be proven to be in the log. Ask the network's operator to have the log begin anew: `resultity-network nodes reset-log`. The node needs nothing done.")
	ReceiptLogReset    = event("5e0c7a41d2b84f3c9a6e1b70f4d8a905", "receipt-log-reset", "The receipt log begins anew", "The network's operator has set aside what this node's key has signed of its receipt log before. The reason given: @RESULTITY_REASON@. The node shows the network what it has, @RESULTITY_COUNT@ receipts, as another log. Proofs of the one before stay valid; each of the new one says that it began anew, and why.")
)

// The key, where another process holds it.
var (
	SignerReady      = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f80", "signer-ready", "The node's key is ready to sign", "resultity-signer holds the key of node @RESULTITY_NODE@ and signs what the agent states. This is its start number @RESULTITY_STARTS@.")
	SignerFailed     = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f81", "signer-failed", "The node's key cannot be used", "resultity-signer could not open the key or its counters; the message says why. `sudo resultity-signer show` tells what is there.")
	SignatureRefused = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f82", "signature-refused", "A signature was refused", "Uid @RESULTITY_UID@ asked resultity-signer for something that it does not sign: kind @RESULTITY_KIND@. An agent that works does not do that. Look at who runs as that uid.")
	KeyCloned        = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f83", "key-cloned", "The node's key is held twice", "The network has seen a later hello of this key than this node's. Either another machine uses the key, or this one was set back to an older state. Stop all but one; there, if it was restored or moved on purpose, `resultityctl identity takeover`. If nobody of yours did this, the key is stolen: `sudo resultity-signer rotate`.")
)

// Generations.
var (
	GenerationStaged = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f60", "generation-staged", "A new generation is ready", "Generation @RESULTITY_GENERATION@ is complete on disk: configuration, image, model and unit, all verified. The one before serves until the switch, which comes next.")
	GenerationPhase  = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f61", "generation-phase", "A part of the switch to another generation is done", "Phase @RESULTITY_PHASE@ of generation @RESULTITY_GENERATION@ took @RESULTITY_TOOK_MS@ ms. `resultityctl generations show` has all of them.")
	GenerationActive = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f62", "generation-active", "A generation is healthy and current", "Generation @RESULTITY_GENERATION@ came up, is sealed and gave the expected answers. It is what the node comes back with after a restart.")
	GenerationFailed = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f63", "generation-failed", "A generation did not become healthy", "The message says at which step generation @RESULTITY_GENERATION@ failed. The node goes back to the healthy one before by itself, and tells the network. If that one comes up, the configuration is to blame and is not tried again; where this machine is (no disk, no memory, Podman does not answer), it is tried again after a while.")
	GenerationDead   = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f64", "generation-dead", "A generation is dead", "Generation @RESULTITY_GENERATION@ failed where another one came up, so that its configuration is not tried again until the network has another. `resultityctl generations show @RESULTITY_GENERATION@` has the reason; `resultityctl generations forward` tries it once more.")
	GenerationBroken = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f65", "generation-broken", "A generation on disk is damaged", "It is not what was written, or is not signed as it must be, and is not used. The node goes on with the one before, or with what the network has. Look at this machine's disk.")
	GenerationPinned = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f66", "generation-pinned", "The operator goes back to an older generation", "Generation @RESULTITY_GENERATION@ is made current and kept until the network has another configuration. Until then the network may give no jobs to this node. `resultityctl generations forward` ends it.")
	GenerationUnpin  = event("7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f67", "generation-unpinned", "The node follows the network's configuration again", "The newest configuration is taken up, also if it was put aside by the operator, or was dead.")
	NetworkLeads     = event("3b6e0f52c8a94d17b1d2e97f60a4c801", "network-leads", "This network decides what the machine runs", "Of the networks that the node is in, it is the one of the highest priority that can use the machine now. Its configuration is staged while what ran before goes on.")
	NetworkWaits     = event("3b6e0f52c8a94d17b1d2e97f60a4c802", "network-waits", "A network is on standby", "The machine's runtime serves another network: @RESULTITY_REASON@. This one is told so and sends no jobs. It gets its jobs done when the other one does not need the machine, or when both ask for the very same runtime. To turn it round, give it the higher priority in agent.toml and restart the agent.")
	RuntimeShared    = event("3b6e0f52c8a94d17b1d2e97f60a4c803", "runtime-shared", "A second network takes part in the runtime", "Its own configuration, image keys and files give the very runtime that is up, and its own validation requests have passed on it. It gets jobs under its own limits.")
	MembershipEnded  = event("3b6e0f52c8a94d17b1d2e97f60a4c804", "membership-ended", "The node's part in a network has ended", "The network has ordered this node to shut down. As the node is in another network, too, the agent goes on for that. The next start of the agent joins this one again; to stay away, remove its table from agent.toml.")
)

// Events lists all events of a node, in the order of their declaration.
var Events []*Event

func event(id, name, subject, text string) *Event {
	e := &Event{ID: id, Name: name, Subject: subject, Text: text}
	Events = append(Events, e)
	return e
}

// WriteCatalog writes the journal catalog of events (https://systemd.io/CATALOG).
// page is the manual page of the program that logs them.
func WriteCatalog(w io.Writer, events []*Event, page string) error {
	var b strings.Builder
	b.WriteString("# Generated from internal/journal by `go generate ./internal/journal`; edit there.\n")
	for _, e := range events {
		fmt.Fprintf(&b, "\n-- %s\nSubject: %s\nDefined-By: Resultity\nDocumentation: man:%s(8)\n\n%s\n", e.ID, e.Subject, page, wrap(e.Text, 78))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// troubles are the ends of the names of events that tell of something that somebody
// may have to look at. The tests refuse an event of which this is not decided.
var troubles = regexp.MustCompile(`(^not-[a-z]+|-(behind|broken|cloned|closed|crowded|damaged|dead|doubted|drifted|dropped|exceeded|expired|failed|invalid|lost|missing|penalty|refused|stale|storm|suspect|unknown|unlimited|waits|wrong))$`)

// fieldInText is where the journal puts a field's value into a text.
var fieldInText = regexp.MustCompile(`@([A-Z_]+)@`)

// WriteTroubles writes the events that tell of something wrong as a list in
// Markdown. All of the network's do.
func WriteTroubles(w io.Writer, events []*Event) error {
	var b strings.Builder
	for _, e := range events {
		if troubles.MatchString(e.Name) || slices.Contains(NetworkEvents, e) {
			fmt.Fprintf(&b, "- **%s** (`%s`). %s\n", e.Subject, e.Name, fieldInText.ReplaceAllString(e.Text, "`$1`"))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func wrap(s string, width int) string {
	var b strings.Builder
	n := 0
	for _, word := range strings.Fields(s) {
		switch {
		case n == 0:
		case n+1+len(word) > width:
			b.WriteByte('\n')
			n = 0
		default:
			b.WriteByte(' ')
			n++
		}
		b.WriteString(word)
		n += len(word)
	}
	return b.String()
}
