// Package wire owns the protocol between a node and its network: the exact
// bytes that are signed and tagged, the messages, and their bounds. It does no
// I/O.
//
// The rule it keeps: a message leaves [Opener.Open] only after its sender, its
// session, its direction, its place in the order and its time have been checked
// over the very bytes that arrived.
//
// # Specification, version 1
//
// Terms. A node is known by its address, the EVM address of its secp256k1 key.
// A network signs with message keys, whose addresses stand in its configuration
// snapshot. keccak is Keccak-256; a signature is r ‖ s ‖ v, 65 bytes, v 27 or
// 28, s in the lower half of the group order. ‖ is concatenation. Everything is
// below one https URL, the network's, and TLS 1.3.
//
// JSON is UTF-8. Each message is the struct of its name below, whose tags are
// the names of its fields. Unknown fields are refused; one that is absent is zero,
// which no id of a job is. In JSON
//
//	byte strings          base64 with padding
//	digests               "sha256:" and 64 lower-case hexadecimal digits, "" for none
//	addresses             "0x" and 40 hexadecimal digits; in headers lower case, or EIP-55's case
//	signatures            "0x" and 130 hexadecimal digits
//	nonces, hashes        "0x" and 64 hexadecimal digits
//	ids of jobs, orders   32 lower-case hexadecimal digits, random
//	times                 Unix milliseconds of the sender's clock, where nothing else is said
//
// The form and the bounds of every value of a snapshot, such as limits and windows
// named here, are in package snapshot.
//
// # Configuration
//
// Below /tuf/ lies a TUF repository (specification 1.0, consistent snapshots, paths
// in package tuf) with one target, config.json, at most 1 MiB. Its SHA-256 is the
// configuration's digest. A node has the first root, verifies the whole chain, and
// takes nothing of the network's that a verified snapshot does not vouch for:
// its reply to a registration included. An [Update] says that there is news.
//
// A node is stricter than the specification: key ids are the SHA-256 of their key;
// no role has a key twice or a threshold above its keys; timestamp and snapshot
// name their file with version, length and SHA-256; targets does not delegate; a
// file has signed and signatures and nothing beside them, no JSON name twice, not
// even in another case, and at most 64 KiB (timestamp 16), 16 levels deep. Fields
// that it does not know are signed with the rest, and ignored. It follows at most
// 256 roots after the one that it was given. Package chain is the reference.
//
// # Registration
//
// POST /node/v1/register with Content-Type application/octet-stream and the
// body signature ‖ JSON, where the signature is the node's, over
//
//	keccak("resultity.v1 register\n" ‖ JSON)
//
// and the JSON is a [Registration]: agent at most 128 bytes, token at most 256,
// all of it at most 64 KiB. The time must be within the network's clock window. The reply, 200, has the same form with a [Registered], signed
// by a message key. Registering again changes nothing and answers how things
// are; the enrolment token is looked at only the first time. A network may let
// nodes register without one: they are bound to no account then. 400 malformed or
// wrong clock, 401 wrong signer, 403 token unknown, used up or expired, 409
// another network's name; 429 and 500, with Retry-After, ask to try again. The
// body of an error is text for people.
//
// # Binding
//
// A node belongs to one account at a time, or to none; an account may have many
// nodes. A binding takes two consents: the owner's, which is a wallet's signature,
// control of an e-mail address, or an enrolment token; and the node's, which is
// its signature of the request. A node that is bound to nobody keeps its session
// and gets no jobs.
//
// POST /node/v1/binding has the form of a registration, with a [BindRequest]
// signed over
//
//	keccak("resultity.v1 binding\n" ‖ JSON)
//
// and a [BindReply]. The step "begin" answers a nonce, which replaces the one
// before and is good for ten minutes and one change; a request that
// names it is refused after that, except that a repetition of the request which
// led to the present state is answered with that state. email is at most 254
// bytes, token 256, code 64. The steps:
//
//	wallet  statement, see below; action bind, or unbind by the present owner
//	email   sends a code of eight digits, good for ten minutes and five tries;
//	        the answer does not depend on whose address it is
//	code    binds to the account of the address that the code was sent to
//	token   binds to the account of an enrolment token, one use per node
//	unbind  the node's own wish
//
// What the wallet signs is EIP-712, domain as for receipts, and the node checks it
// before it sends it; expiresAt is at most an hour after issuedAt:
//
//	Binding(string network,address node,address owner,string action,bytes32 nonce,uint64 issuedAt,uint64 expiresAt)
//
// A node that is bound is refused (409) until it has been unbound. An account
// is named by the wallet's address, by what the token says, or by an opaque name
// that stands for an e-mail address. 400 malformed, wrong clock or nonce, 401
// wrong signer, 403 not registered, or a consent that does not hold, 409 bound
// already, or another network's name, 429 too often, 500 and 503 not now.
//
// # Session
//
// A node holds one WebSocket (RFC 6455), GET /node/v1/session, subprotocol
// "resultity.v1", no compression. The request carries
//
//	Resultity-Network: NAME
//	Resultity-Node: 0x…
//	Resultity-Key: 64 lower-case hexadecimal digits
//
// and the 101 reply Resultity-Key, 64 digits of the network's. They are X25519
// public keys (RFC 7748), made for this session and used in no other; each is
// its side's nonce, too. Both sides compute, over the 32 bytes of each key as
// they were sent,
//
//	session = keccak("resultity.v1 session\n" ‖ keccak(NAME) ‖ node ‖ node's key ‖ network's key)
//	key(d)  = HKDF-SHA256(secret = X25519, salt = session, info = "resultity.v1 tag\n" ‖ d, 32 bytes)
//
// where d is a direction: one byte, 1 to the network and 2 to the node. A shared
// secret of zeros and a key that equals one's own are refused. Both sides forget
// the private keys then, and key(d) with the session.
//
// 400 says that a header is missing or malformed, 403 that the node is not
// registered, 409 that the network has another name, 503 to try again later. A
// second session of a node ends the first once its Hello has been checked.
//
// # Frames
//
// Every message is one binary WebSocket message of at most 24 MiB:
//
//	first frame of a direction = signature ‖ body
//	every later one            = tag ‖ body
//	signature over keccak("resultity.v1 frame\n" ‖ session ‖ direction ‖ body)
//	tag = HMAC-SHA256(key(direction), body), 32 bytes
//
// The first frames are [Hello] of the node and then [Welcome] of the network,
// each with the key that the other knows. As session has both X25519 keys in it,
// the two signatures say who holds them: whoever exchanged one on the way has
// another session, and no signature for it. The network sends Welcome after it
// has checked Hello, and may send tagged frames right behind it. A node sends
// and accepts a tagged frame only after it has checked Welcome. A tag where a
// signature is due, or the other way round, is as wrong as a false one.
//
// The session lives as long as the key that signed Welcome: when a newer
// snapshot does not list it any more, the node ends the session, at the next
// frame that it receives and at its next ping. It connects again as usual.
//
// The body is
//
//	{"seq":1,"time":1767225600000,"type":"hello","data":{…}}
//
// in exactly this spelling: these four names in this order, no white space
// outside of data, numbers in decimal without sign and leading zeros and below
// 2^63, no escapes in type. data is a JSON object; white space in it is free
// but for [Chunk] and [Result], which have one spelling, too: no white space,
// the fields in the order in which their types list them, and those of a result
// that are empty left out.
//
// Only for a frame with the right proof is its sender to blame: a network holds
// nothing against a node whose frames were changed, repeated or lost on the way.
//
// seq starts at 1 in each direction and rises by one. time is the sender's
// clock in Unix milliseconds and must be within the clock window of the
// snapshot when the frame begins to arrive. A frame that is too large,
// malformed, by somebody else, out of sequence or off in time ends the session:
// the receiver closes with status 1008 (1009 for size) and counts it. Whatever
// is received is checked over the received bytes; nothing is serialised again
// before checking.
//
// The first frame of a node is at most 16 KiB and due within 10 seconds of the
// 101 reply, Welcome, of at most 16 KiB, within 10 seconds of Hello. WebSocket pings carry no
// meaning but life: a node sends one every 5 seconds and ends a session that is
// silent for 15, a network every 15 seconds and 45. Both answer pings. A
// network ends the session (1008) of a node that leaves 1024 messages or 64 MiB unread,
// and slows down one that sends what nobody asked for. A frame of
// more than 20 KiB may have to wait until the network reads the rest of it, once more
// at 256 KiB. It must then arrive within 3 minutes, and, while others wait, at 256 KiB a
// second on average from the fifth second on. A node connects
// again after half a second, then ever later, up to 15 seconds; after what
// only people can mend (403, 409), a minute.
//
// Why tags beside TLS: TLS may end at a front proxy of the network's operator,
// and the node does not take that proxy's word. Why not signatures: one costs
// a hundred times a tag, for each token; and a key that is kept outside of the
// agent is asked once for each session. What is lost: a tagged frame proves
// nothing to a third party, since both sides can make it. Nothing needs that:
// what a node answers for is in its receipts, which it signs.
//
// [Hello.Count] rises with each Hello that a node signs for a network, by one where nobody
// intervenes, and is written down (synced) before it is signed. A network that has seen the
// same or a higher count of the node before ends the session with status 4001: the
// key is held twice, or the node's disk was set back to an older state. It cannot tell
// which of the two is the genuine one; each Hello of one shows at the next Hello of
// the other. An operator who has moved or restored the key on purpose has the count
// go on at the next multiple of 2^20, so that the other one is behind. The network may
// write counts down late: a count that it has lost delays the discovery.
//
// # Messages
//
// The type of a message is its struct's name in lower case. Texts for people are
// one printable line of at most 512 bytes; a receiver cuts what is not.
//
// From the node: [Hello], [Heartbeat], [Accept], [Refuse], [Chunk], [Result],
// [Bye], [OrderDone], [Logs], [Leaves], [Sandbox]. From the network: [Welcome],
// [Bound], [Status], [Job], [Cancel], [Ack], [Update], [Order], [OrderAck],
// [LogsAck], [LeavesAck], [SandboxAck].
//
//	Hello       first; the digest of the verified snapshot, if there is one, and Count, see below
//	Welcome     first; Session is session in hexadecimal digits, for logs
//	Bound       behind Welcome, and whenever the binding has changed
//	Update      behind Welcome if Hello named another configuration, and when one is published
//	Heartbeat   behind Welcome, then every heartbeat_s and at changes; at most 256 models
//	            and 256 GPUs, slots and busy 0 to 65536; head is that of the
//	            receipt log, class see below
//	Status      when a heartbeat, or its absence for window_s, has changed the answer
//	Cancel      nobody waits for the job; the node stops and answers a Result, code cancelled
//	Ack         for each Result, also for one of a job that the network does not know;
//	            it may wait for others, but a failed job comes again only behind its own
//	Bye         the node will close; nothing follows
//
// A node gets jobs while it is bound, its last heartbeat names the network's
// configuration, an active model and runtime, and it is not draining: Status
// says whether, and why not. A node may be in several networks with one key and one
// runtime. Where its configuration gives this network the very same runtime as
// another one, it is active in both, and busy counts the slots that are not to be
// had; where it does not, the runtime's state is "standby", and the node gets no
// jobs until it is "active". All that a node signs names the network, or a
// configuration that does: what it has said in one counts in no other, also where
// both have one chain_id. What is out of bounds is a protocol violation: it
// ends the session with 1008, and the node gets no jobs for a while.
//
// The class of a heartbeat is the determinism class of the runtime that is active
// for this network: two nodes of one class should give the same answer to the same
// request. Package determinism says byte for byte how its digest is made; hardware
// is the part of it that is the machine's, as it is hashed. A node that cannot name
// something of its machine which changes an engine's arithmetic has no class, and
// its answers are compared with nobody's. fingerprint is that of the node's answers
// to the golden requests of the heartbeat's configuration, as the same package says:
// a network compares those of one class and configuration, and points out a node whose
// answers differ from the others'. hardware lists at most 64 features and 64
// GPUs; each text in it is printable ASCII without quotes and backslashes, of at most
// 128 bytes.
//
// The life of a job:
//
//	network                                   node
//	  Job ────────────────────────────────────▶ checks, writes it down (synced)
//	  ◀───────────────────────────── Accept | Refuse
//	  ◀──────────────────── Chunk, Chunk, …       only if stream
//	  ◀──────────────────────────────── Result    written down (synced) before it is sent
//	  stores it (synced)
//	  Ack ────────────────────────────────────▶ forgets it
//
// A node accepts a job id at most once at a time. When a job arrives that it
// is working on, it answers Accept again; when it has the result, it sends
// the Result again. A job whose result with a receipt has been acknowledged is
// refused with internal: a node never signs two receipts for one job. After a
// reconnect the node first sends every unacknowledged
// result. The network counts the first valid result of a job and acknowledges
// any further one without counting it, so delivery is at least once and the
// effect exactly once.
//
// A job is dispatched under a configuration: [Job.Config] is the digest of the
// snapshot, and a node that is on another refuses with config_mismatch. Model is
// the snapshot's, Request at most request_bytes, Deadline at most deadline_s
// ahead, Kind and Stream what Request says. A node that does not answer Accept or
// Refuse within 3 seconds (and what a link of 1 MiB/s needs for the request), or
// makes no progress for a third of the job's time, may see another node get the job;
// whoever delivers first counts.
//
// A job that is refused or has failed has a [Code]. After
//
//	bad_request, context_length, limit, deadline, cancelled
//
// no other node would do better, which the network believes of two nodes; after
// any other code it tries another node. A failed result has neither response nor
// receipt, any other no message. Once a failed one is acknowledged the job may come
// again.
//
// A network may give the request of a finished job out again, to any node of the same
// determinism class, to compare the answers. That is another job, with an id,
// Created and Deadline of its own and with the same Request and Seed: a node cannot
// tell it from others. The class of a job is the one in the heartbeat before it was given;
// a node whose receipt names another one is pointed out, and is judged by the former.
//
// How a stream is cut into chunks means nothing; a node joins those that wait.
// Chunk.Offset is the place of its bytes in the response body, so that a
// stream can go on from another node or from the result: bytes that were
// passed on already are skipped if they are equal. [Result.Response] is always
// the whole body, at most response_bytes. A node may leave out chunks when it
// cannot send as fast as its engine writes: the result has them.
//
// # Orders
//
// An [Order] has a node do something outside of its jobs. Its body is the JSON of
// a [Directive], at most 8 KiB, and its signature is by a message key, over
//
//	keccak("resultity.v1 order\n" ‖ body)
//
// so that it can be kept and shown as evidence of who ordered what. Network and
// node stand in the body. A node refuses an order that is signed by another key,
// for another node or network, malformed, past its expiry (by its own clock), of
// a kind that it does not know, or one too many to remember, with an [OrderDone]
// whose outcome is refused; none of these ends the session. It refuses a drain or
// resume that was issued before the last one that it has carried out, and a restart
// where it has begun three within the hour before, by its own clock: each takes the
// machine from its work for minutes. Expiry is at most 7 days after issue.
//
//	network                                   node
//	  writes it down (synced)
//	  Order ──────────────────────────────────▶ writes it down (synced), does it
//	  ◀───────────────────────────── OrderDone    writes the outcome down (synced)
//	  writes it down (synced)
//	  OrderAck ───────────────────────────────▶ sends it no more
//
// The network sends an order again at each new session until it is answered or
// expired, those of a node in the order of their issue. A node carries out an id at most
// once, over restarts too: it remembers ids until they have expired, and answers
// one that comes again with the same outcome. One whose doing a crash cut short
// has failed. After a reconnect it sends every unacknowledged OrderDone again. The
// network acknowledges answers to orders it does not know.
//
// # Logs
//
// A node sends what its log has gained as [Logs]: a body with the JSON of a
// [LogBatch], signed by the node over
//
//	keccak("resultity.v1 logs\n" ‖ body)
//
// and Data, gzip of lines, each the JSON of a [LogRecord]; at most 256 KiB, at most
// 4 MiB inflated. Positions rise by one with each record that the node has
// written, from the beginning of its spool; numbers that are missing are of records
// that were dropped at the spool's bound. At most one batch of a node is on its way. The
// network stores a batch (synced) whose After is not below the position that it
// has of this spool, and answers every batch with a [LogsAck] that holds the
// position it has then. The node goes on from there. So each record is stored at
// most once, and at least once while the node has it. Only the fields named in
// [LogField] may be in a record, within their lengths, and a record with the
// field job has neither error nor reason. A batch that breaks this, or is signed by
// another key, is a protocol violation.
//
// # Sandbox
//
// A [Sandbox] holds a record of the container that a node works in, package
// sandbox/record, signed by the node over
//
//	keccak("resultity.v1 sandbox\n" ‖ record)
//
// The record is the JSON of [record.Record], at most 48 KiB, in the one spelling
// that Go's encoding/json gives it: fields in their order, names of maps sorted,
// no white space, <, > and & as \u003c, \u003e and \u0026. It holds what the bridge,
// the container's first process, has found inside, and what the agent sees from
// outside. Both are the node's own word: whoever owns the machine can make up both.
// There is none of a sandbox that is not sealed.
//
// A node looks before it takes jobs from a start of its runtime, and then at an
// interval of its operator's, a minute where nothing else is said, at least every hour. It makes
// a record after the first look, and after one by which the last is an hour old
// while it has a session. A look that finds another state than the first ends the
// runtime and makes no record. What a receipt names as sandboxDigest is SHA-256 of
// the record's bytes that was the newest when the job began.
//
//	node                                      network
//	  writes it down (synced)
//	  Sandbox ────────────────────────────────▶ checks, writes it down (synced)
//	  ◀──────────────────────────── SandboxAck
//	  a job begins, and its receipt names it
//
// A node sends a record before the first result that names it, and again at the
// beginning of each session, behind Hello, until it is acknowledged; the newest in any case.
// The network refuses one that is malformed, by another node or for another network,
// or whose time is ahead of its own by more than the clock window: a protocol violation.
// A result with a digest that the network has no record of is accepted all the
// same, counted and logged: the client has its answer, and sees that there is no
// record when it asks for one. A node that has a session but no acknowledgement for
// 30 seconds sends the record again. GET /v1/sandbox/DIGEST answers clients, for as long as there may
// be a receipt with it, with the JSON of [record.Signed]: the record as it was signed.
//
// # Response bodies
//
// A node asks its engine to stream, checks every event, and writes the body
// itself: for chat a "chat.completion" object or "chat.completion.chunk"
// events, for completion a "text_completion" object or events. id is
// "chatcmpl-" or "cmpl-" and the job id, created is Job.Created, model is
// Job.Model, so that two nodes that compute the same tokens write the same
// bytes. A streamed body is the whole text/event-stream including its last
// "data: [DONE]" and the blank line.
//
// # Receipts
//
// A result carries a receipt, EIP-712 typed data with the node's signature
// (package receipt has its JSON):
//
//	EIP712Domain(string name,string version,uint256 chainId): "Resultity", "1", chain_id of the snapshot
//	Receipt(bytes16 job,address node,Measured measured,Claimed claimed,uint64 sequence)
//	Measured(bytes32 configDigest,bytes32 imageDigest,bytes32 modelDigest,bytes32 sandboxDigest,
//	         bytes32 requestHash,bytes32 responseHash)              (one line, without spaces after commas)
//	Claimed(bytes32 classDigest,uint64 promptTokens,uint64 completionTokens,
//	        uint64 startedAt,uint64 finishedAt)                     (one line, too)
//
// Measured holds what the agent has hashed or verified itself, Claimed what it
// passes on: the word of the engine, the hardware and the node's clock. A digest that
// a node cannot give is that of nothing, SHA-256 of no bytes; none is zero.
// requestHash is SHA-256 of Job.Request and responseHash SHA-256 of
// Result.Response: the bytes that the client sent and got. imageDigest is that of
// the image's manifest; modelDigest is SHA-256 over the lines that sha256sum
// prints for the model's files, sorted by path; classDigest is that of the class
// (see Messages) in which the job ran. sequence is never 0 and never twice
// the same for a node and a chain: its upper 32 bits say how many times whoever
// holds the node's key has been started, its lower ones are the receipt's number
// since, from 1. Two receipts with one sequence show two holders of the key; a gap
// within one start hints at a receipt that was signed and not delivered. Receipts
// arrive in any order. The network checks all of them, the signer, and that token
// counts and times (within the clock window) are possible, before it acknowledges. A result that fails this check is a protocol violation: it ends
// the session, is counted, and the job goes to another node.
//
// # Receipt log
//
// A node keeps a log of the receipts that it has signed, one for each network,
// as a Merkle tree (RFC 9162, section 2.1, with Keccak-256): a leaf is
// keccak(0x00 ‖ EIP-712 hash of the receipt), an inner node keccak(0x01 ‖ left ‖
// right), the root of the empty log keccak of nothing. A receipt enters when its
// result is written down, in the order of that, and once; a failed result has none. The node states
// what its log is by a head, EIP-712 with the domain of receipts:
//
//	ReceiptLogHead(address node,string network,uint64 era,uint64 size,bytes32 root,uint64 time)
//
// Whoever has two heads of a node for one network and era can be shown that the larger
// log begins with the smaller one, or holds the node's contradiction. era is 0 until the
// network's operator has the log begin anew, since somebody has lost what cannot be made
// again; it is a time then, in Unix milliseconds, by the network's clock. The network's
// word for it is EIP-712, by a message key, with the domain of receipts:
//
//	ReceiptLogReset(address node,string network,uint64 era,uint64 before,bytes32 first,bytes32 second,string reason)
//
// before is the era that ends, below era. first is the EIP-712 hash of the newest head of
// that which the network knows, second of one that contradicts it; zero for none. Both
// heads stand in it, with the node's signatures; reason is one printable line of at most
// 512 bytes. A log of a later era is another one. Who checks a proof under a head whose era is
// not 0 must have the word for that era with it: else the node has made it up. A log has
// at most 2^42 receipts. The compact range of a size, "edge", is the roots of
// the full subtrees that its first leaves fall into, the largest first: one for each bit
// that is set in the size. It is enough to append, and gives the root.
//
//	network                                   node
//	  Welcome, LeavesAck ─────────────────────▶ looks whether it is its own log
//	  ◀─────────────────── Leaves, Leaves, …      from LeavesAck.Size on
//	  ◀────────────────── Heartbeat with head
//	  checks, stores both (synced)
//	  LeavesAck ──────────────────────────────▶
//
// The network begins with a [LeavesAck], before it acknowledges any result in the
// session, and sends one for each head that it has stored: how many leaves it has, the
// node's head of that size, and the edge. With no leaves it has no head. The first of a
// session has the word for the log's era, where that is not 0, by the key that the network
// signs with now; the era is the same to the end of the session. Lost is the newest head of the
// era of which the network has lost the leaves, as long as it has fewer.
// [Leaves] follow one another without a gap from there on, at
// most 1024 in a message and 65536 before the head that covers them. Those that no head
// has covered when the session ends count as not sent. From its first receipt on, once
// it has had a LeavesAck, a node has a head in each heartbeat, whose size is exactly
// the end of what was sent. As long as there is nothing new it may be the same one.
// One head is on its way at a time: the next leaves follow the network's word about
// the last head. A network that has not all that the head has repeats what it has; the
// node goes on from there.
//
// The network takes a head that is by the node, of this network, chain and era, of that
// size, and whose root is that of its copy with the leaves. A head of another size or
// by another key, a gap, an edge in the wrong place, a time that is ahead of the network's clock
// by more than the clock window, or behind that of the head before by more than two: a
// protocol violation. Where it has no room for leaves now, or no head of them comes for a
// minute, it drops them, takes no others, and repeats what it has when the head of those
// that came has come, and up to ten seconds have passed. It may store a head a second, and of
// those that come faster the last. Where it finds that it has lost its copy, it ends the session
// with 1013, and the next one begins from what it has. A head of
// the node with another root contradicts the one that the network has: it takes neither
// leaves nor head, keeps both heads as evidence, and gives the node no jobs, for the
// reason that [Status] says. When its operator has the log begin anew, it writes down its word
// with both heads, ends the session with 1013, and begins the next one with no leaves of
// the new era. It keeps the log of the era before, and proves what is only in that.
//
// Where the network finds that 256 leaves of its copy are damaged, from a multiple of 256
// on, it asks for them with Again in a LeavesAck, for one such part at a time. A node that
// goes on from what the network has answers with [Leaves] of that From, with Again, and all 256
// or none. The network holds them against the root that they must have. They are no part of
// what goes on from Size.
//
// The node goes on from what the network has if its own log has the same root at that
// size. If it has not, or is shorter, and the head in LeavesAck has its own signature
// and the edge gives the head's root, then its disk was replaced or set back: it takes
// over the network's log and appends those of its receipts that the network has never
// acknowledged, so that some may be in the log twice. A LeavesAck for which that does
// not hold, or which has another log of no more receipts than the network has
// acknowledged, is answered by no leaves and no heads in this session, and told to the
// operator. A node's key signs a head of an era only if its log begins with that of its
// last one (package signer has that shown): a node that has lost what the network never
// had shows no leaves until the network has the log begin anew. So does one whose log does
// not go on from Lost, though it has signed that: both sides have lost something then.
//
// A node takes a word for another era that is about it and this network and by a
// message key of its configuration; by another one, it shows no leaves in this session.
// Its log stays what it is: it shows what it has of it as the log of the new era, of
// which the network is not known to have anything. An era is named by the time at which the
// network began it: a node's key signs for none that is more than a day ahead of its clock.
//
// A network that has lost leaves which the node has no longer (it keeps the last
// 65536 at least) gets the rest with [Leaves.Edge], the compact range at From; the
// network goes on from that and can prove only what comes behind it. Edge is a violation
// unless From is above the size in the last LeavesAck, and in all but the first Leaves
// behind that.
package wire
