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
// 28, s in the lower half of the group order. ‖ is concatenation. JSON is
// UTF-8; unknown fields are refused; byte strings are base64 with padding;
// digests are "sha256:" and 64 lower-case hexadecimal digits; addresses are
// "0x" and 40 hexadecimal digits. Sessions and registrations are TLS 1.3.
//
// # Registration
//
// POST /node/v1/register with Content-Type application/octet-stream and the
// body signature ‖ JSON, where the signature is the node's, over
//
//	keccak("resultity.v1 register\n" ‖ JSON)
//
// and the JSON is a [Registration]. The time must be within the network's
// clock window. The reply, 200, has the same form with a [Registered], signed
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
// led to the present state is answered with that state. The steps:
//
//	wallet  statement: package binding; action bind, or unbind by the present owner
//	email   sends a code of eight digits, good for ten minutes and five tries;
//	        the answer does not depend on whose address it is
//	code    binds to the account of the address that the code was sent to
//	token   binds to the account of an enrolment token, one use per node
//	unbind  the node's own wish
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
// before checking. WebSocket pings keep the connection known to be alive; they
// carry no meaning.
//
// Why tags beside TLS: TLS may end at a front proxy of the network's operator,
// and the node does not take that proxy's word. Why not signatures: one costs
// a hundred times a tag, for each token; and a key that is kept outside of the
// agent is asked once for each session. What is lost: a tagged frame proves
// nothing to a third party, since both sides can make it. Nothing needs that:
// what a node answers for is in its receipts, which it signs.
//
// # Messages
//
// The type of a message is its struct's name in lower case. Texts for people are
// one printable line of at most 512 bytes; a receiver cuts what is not.
//
// From the node: [Hello], [Heartbeat], [Accept], [Refuse], [Chunk], [Result],
// [Bye], [OrderDone], [Logs]. From the network: [Welcome], [Bound], [Status],
// [Job], [Cancel], [Ack], [Update], [Order], [OrderAck], [LogsAck].
//
// Bound follows Welcome, and comes again whenever the binding has changed.
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
// snapshot, and a node that is on another refuses with config_mismatch.
//
// How a stream is cut into chunks means nothing; a node joins those that wait.
// Chunk.Offset is the place of its bytes in the response body, so that a
// stream can go on from another node or from the result: bytes that were
// passed on already are skipped if they are equal. [Result.Response] is always
// the whole body.
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
// resume that was issued before the last one that it has carried out. Expiry is at
// most 7 days after issue.
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
// A result carries a receipt (package receipt) whose requestHash is SHA-256 of
// Job.Request and whose responseHash is SHA-256 of Result.Response: the bytes
// that the client sent and got. The network checks both, the signer, and that
// configuration, image and model are those of the snapshot, before it
// acknowledges. A result that fails this check is a protocol violation: it ends
// the session, is counted, and the job goes to another node.
package wire
