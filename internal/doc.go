// Package internal holds the parts of a Resultity node and of its reference
// network. This page is the overview; each package says the rest about itself.
//
// # What there is
//
//	resultity-agent    the control layer: a rootless systemd user service
//	resultity-bridge   PID 1 inside the sealed runtime container
//	resultity-signer   holds the node's key where there is root to install it
//	resultityctl       the operator's command
//	resultity-network  the reference network, on embedded NATS JetStream
//
// A node turns a Linux machine into one unit of a network for language-model
// inference. The agent holds the node's identity, applies signed configuration,
// fetches and verifies images and models, has systemd run one sealed container
// with an inference engine, takes jobs and returns signed results. The machine's
// own tools do the heavy work: rootless Podman runs the container, Quadlet
// describes it, systemd starts, watches and restarts it, the journal keeps the
// log, sigstore and TUF carry trust.
//
// # Two one-way flows
//
// Each arrow is a type that only the step before it can make.
//
//	configuration
//
//	  network ──TUF──▶ tuf.Client ──snapshot.Snapshot──▶ deploy.Stage ──deploy.Plan──▶ deploy.Apply ──deploy.Deployment──▶ active
//	                   verifies       immutable,          image and model  sealed unit   systemd starts,  up, sealed,
//	                   every byte     checked bounds      verified         rendered      both views agree validated
//	                                                      │                              │
//	                                                      ▼                              ▼
//	                                                 generation N: staged ──▶ on trial, current ──▶ healthy, or dead and back
//
//	jobs
//
//	  network ──wire.Job──▶ session ──▶ work ──▶ state ──▶ runtime ──▶ receipt ──▶ state ──wire.Result──▶ session ──▶ network
//	                        frame       admits   accepted  engine's     signed      result                            acknowledges;
//	                        checked              (synced)  output       statement   (synced)                          state forgets
//	                                                       checked
//
// They meet in one place only, the active deployment, owned by one goroutine
// (agent's update loop). A job keeps the terms it was accepted under.
//
// A node may be in several networks. Each has both flows to itself, up to that one
// place:
//
//	mainnet ── snapshot ──▶ plan ──▶ generation ──▶ deployment ◀── door ◀── work, state, session ── jobs of mainnet
//	                                                 │ same unit
//	testnet ── snapshot ──▶ plan ──▶ (shared, or    ─┘          ◀── door ◀── work, state, session ── jobs of testnet
//	                                  on standby)
//
// The first network in the operator's order that can use the machine decides what
// it is (agent, lead.go). Another one's plan, staged by itself, becomes a
// deployment of its own on the same start of the unit if it renders the very same
// text and its own golden requests pass. What both use is the engine's slots
// ([work.Slots]). Everything that a node signs is bound to one network's name,
// by itself or by the digest of a configuration that holds it.
//
// Four small things pass beside them, each signed on its own so that it can be
// shown to others later: orders of the network's operator (order, and the memory of
// which were carried out), the binding to an account (binding), the node's log
// on its way to the network (spool), and what the sandbox was seen to be
// (sandbox/record, and sandbox/book until the network has it).
//
// # Level-triggered and crash-only
//
// The agent compares what should be (the last verified snapshot) with what is
// (images, models, the unit, the container) and moves one repeatable step at a
// time. Start-up runs the very same steps. A kill at any instant leaves the old
// state or the new one, never a mix, and loses no accepted job and no result.
// Each instant at which that could go wrong has a fail point (see failpoint), and
// test/crash kills the programs there.
//
// A disk that changes what was written stops neither side. The node's job store
// (state), the memory of orders and the key's counters, and the network's store
// (internal/network/store/blocks) mend what a checksum tells them, set the rest
// aside, and name what is lost. Where it cannot be told whether something was
// answered, it counts as answered: another node does it, and none twice.
//
// # Generations
//
// Each configuration that the node is brought to is a numbered generation on
// disk (package generation), which says whose it is. It is staged, completely, beside the one that
// serves; one rename makes it current; then jobs are drained, the runtime is
// switched and validated. One that does not become healthy in its time is left
// for the healthy one before. If that one comes up, the configuration is to
// blame: it is dead, the network is told, and it is not tried again until there
// is another. If this machine is to blame (no disk, no memory, no Podman, or
// neither comes up), it is tried again later. Start-up begins from what is
// current on disk, so that neither a reboot nor an absent network changes it.
//
// # Layers
//
// Imports go downward only; test/rules holds the list and fails otherwise.
//
//	leaves  failpoint; digest, durable, evm, gate, journal, plainhttp, spelling,
//	        toml, version;
//	        chunk
//	pure    receipt, receiptlog, binding, determinism, bridge/contract;          no I/O, no clock
//	        sandbox/record; wire, snapshot; openai, quadlet, chain
//	        config                                                               reads its files, no more
//	edges   model/fetch, model/share, model/format, model/signature;             one thing outside each
//	        identity, signer, tuf, session, image, model, podman, systemd,
//	        runtime, state, generation, order, spool, preflight, support,
//	        sandbox/book;
//	        control, sandbox, hardware
//	order   work, deploy
//	top     agent, ctl, signer/cli
//
// An edge talks to one thing outside of the process and never imports another
// edge. The network service (internal/network, internal/publish) shares leaves
// and pure packages with the node and nothing else.
//
// # Decisions and their reasons
//
// The agent never runs the podman command. It speaks D-Bus to its user manager,
// Podman's REST API and unix sockets, so that its own unit can be sandboxed with
// mount namespaces and seccomp; a podman child could not start under those.
//
// The agent has a Podman API service of its own (resultity-podman.socket), whose
// HOME is a private directory. Podman reads its signature policy from there, so
// that an ordinary user's own policy is left alone, while storage stays the
// account's.
//
// Units are generated into the runtime directory, which a reboot empties:
// nothing starts before the agent has verified it again.
//
// Podman seals the container, and the bridge the engine in it once more, with a
// seccomp filter and, where the kernel has it, Landlock: a network namespace does
// not hold all kinds of sockets, and the socket's directory is on a real disk. Where
// it can, it gives the engine a mount namespace in which systemd's socket and the
// agent's are not to be seen: the engine has the bridge's user id, and neither filter
// nor Landlock looks at the path that a socket is connected to.
//
// What the bridge saw of the sandbox from inside, and the agent from outside, is
// one signed record for each start of the runtime, and another one after each
// hour. Receipts name it by its digest, as it is kilobytes of text. A record is on
// the node's disk before a receipt names it, and stays there until the network has
// it; the network counts receipts that name one it lacks, and takes them, since
// their clients would have nothing of a refusal. The agent looks again every
// minute. A sandbox that has changed, which takes root or the agent's account,
// ends the runtime at once: its jobs could be answered by whoever is in there, so
// they are other nodes'. Nothing hinders that somebody from lying in the next
// record; that is what signatures of the hardware would be for.
//
// The runtime outlives the agent: an upgrade or a crash of the agent does not
// unload the model. A restarted agent finds the unit unchanged, looks at its
// sandbox, validates it, and goes on.
//
// Response hashes in receipts are over the HTTP body that the client got, byte
// for byte, also for streams: `sha256sum` on the client's side is the check.
//
// Frames of a session are not signed one by one: the first of each side is, and
// with it the X25519 keys from which both make the keys of the tags that all
// later frames carry. TLS alone would not do, as it may end at an operator's
// front proxy; a signature for each frame costs a hundred times a tag, for each
// token of a stream, and would have whoever holds the node's key asked for each.
// A frame therefore proves nothing to third parties. Receipts do.
//
// The node's key is a system service's (resultity-signer), where root has installed
// it: a rootless agent cannot hide anything from its own account. It is asked for a
// statement, never for the signature of a hash, and numbers what it signs: hellos
// by a count that is on disk first, so that the network sees a copy of the key, or a
// disk that was set back; receipts within one start of it, so that none of them
// waits for a disk. Heads of receipt logs it signs only with the proof that the log has
// grown from that of the last one. The connection stays open and an exchange is one write and one read.
//
// A node's receipts are leaves of a Merkle tree (receiptlog), which grows in the very
// write that makes a result durable: no head is signed for what a crash could
// take back, and no result is delivered that the tree lacks. Heads go with heartbeats,
// leaves before them; the network's copy is what a replaced disk goes on from.
//
// Accepted jobs and results are in an append-only log of the agent's own (state): one
// sync for all who commit at once, room for the failure of every accepted job set
// aside ahead of time. A database syncs more often for each commit, and meets a full
// disk after a job was accepted.
//
// The network writes a job down while a node works on it already, and a result
// while its client reads it: the disk is off the way of the first token. What
// nobody may see before it is durable, the end of an answer and the node's
// acknowledgement, waits (see network/dispatch).
//
// The network's operator does not steer nodes by the session but by orders, which
// are signed one by one and kept. What has consequences for a node's owner is
// evidence against whoever ordered it.
//
// What may leave a node in its log is a list of fields with lengths, on both
// sides. Leaving texts out by rule would fail with the first careless error; a list
// fails the other way.
//
// The network keeps whole copies of its nodes' receipt logs, not heads alone: a proof
// for a client must not depend on the node, which may have gone. It believes its own
// copy as little as the node: what is stored leads to a head that the node has signed,
// and a proof is checked before it is given out. Receipts that are in no log are
// counted, since only the network knows of all of them.
//
// SHA-256 names all content (it has hardware support and a command on every
// machine); Keccak-256 appears only where EVM signatures need it.
package internal
