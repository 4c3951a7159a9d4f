package journal

// NetworkEvents lists the events of the network service, in the order of their
// declaration. They have a catalog of their own: nodes and networks are installed
// apart from one another.
var NetworkEvents []*Event

func networkEvent(id, name, subject, text string) *Event {
	e := &Event{ID: id, Name: name, Subject: subject, Text: text}
	NetworkEvents = append(NetworkEvents, e)
	return e
}

// What the network service refuses of nodes and of strangers.
var (
	NodeFrameRefused        = networkEvent("6d1d37f3bc64f074f882881450fadd18", "node-frame-refused", "A message of a node was refused", "The session of node @RESULTITY_NODE@ was ended, nothing of the message had an effect, and its jobs went to other nodes. Reason @RESULTITY_REASON@. Of these anybody on the way may be to blame, and the node is back as soon as it has connected again: too_large (more than there may be in a frame), signer (the first frame is not by the key of that address: a stranger who names it, as a rule), tag (changed on the way, or not of this session), sequence (repeated, lost or out of order), clock (the clocks differ by more than the configuration allows). Of these only the node: malformed (not as the protocol spells it), order (not the time for this message), invalid (an impossible heartbeat, chunk or result, or a receipt that does not hold), logs (its log has what may not leave a node), receiptlog (leaves or a head that do not follow those before), sandbox (a record that is not of this node and network). It gets no jobs for a while then. An agent that works does none of them.")
	NodeSessionRefused      = networkEvent("b5a79b0b0eca569e8b3896f7d5f98ce4", "node-session-refused", "A session was refused", "Somebody asked for a session and was answered @RESULTITY_STATUS@; the message says why: a header that is missing or malformed, another network's name, an address that is not registered, or too many connections. A node that is not registered asks again each minute: its operator has to enrol it, or has been removed from this network.")
	NodeRegistrationRefused = networkEvent("eeaa9b552a672753a8601f61da47b1b3", "node-registration-refused", "A registration was refused", "It was answered @RESULTITY_STATUS@; the message says why: it is malformed, by another key than the node's, for another network, of a wrong clock, without a token that is good, or one of too many. `resultity-network token create` makes a token.")
	NodeBindingRefused      = networkEvent("91b9706a220d48f5ccef4b02a4ef279a", "node-binding-refused", "A request about a binding was refused", "Node @RESULTITY_NODE@ asked for step @RESULTITY_STEP@ and was answered @RESULTITY_STATUS@; the message says why. Its operator was told the same.")
	NodeCloned              = networkEvent("9f5471505036224a8a43937dbd006714", "node-key-cloned", "A node's key is held twice", "Two machines use the key of node @RESULTITY_NODE@, or one was set back to an older state. The network cannot tell which is genuine. Ask the node's operator; `resultity-network nodes show` has it, too.")
	ConnectionsRefused      = networkEvent("385fabcbe666eef9ea763844542b6c91", "connections-refused", "Connections are refused", "There are as many as max_connections allows, of all or of the source in the message, so that more are closed at once. The log says so once a minute, the metric resultity_connections_refused_total counts them. If one source does not stop, block it before this service; if nodes are kept out, raise max_connections.")
)

// What it finds out about nodes.
var (
	NodeAnswersOdd        = networkEvent("de2f205995f29f74f6333d1bb837da3b", "node-answers-odd", "A node gives other golden answers than its class", "Node @RESULTITY_NODE@ says that it is of one determinism class with others and gives other answers than most of them. It gets jobs all the same. Its hardware may compute wrong, or it does not run what it says. `resultity-network jobs replay` has others repeat its jobs.")
	AnswersDiffer         = networkEvent("7d21e960d6d5fc97da255c7eee69c8dc", "answers-differ", "Two nodes of a class give different answers", "Job @RESULTITY_JOB@ was given out again, and the second answer is not the first; the message says where they part. One of both nodes does not compute what it says, or both are busy with an engine that computes otherwise then. A third node tells: `resultity-network jobs replay`.")
	NodeClassContradicted = networkEvent("161fb5d4dac34eca96d33a8627a72137", "node-class-contradicted", "A node has signed for another determinism class than it had named", "Node @RESULTITY_NODE@ named one class in its heartbeats when it was given job @RESULTITY_JOB@, and another one in the receipt, which is the evidence. Once may be a heartbeat that was late, when its runtime was started anew. One that does it again and again wants its answers to be compared with nobody's: a replay goes by the former class (`resultity-network jobs replay`). It gets jobs all the same; to end that: `resultity-network order NODE drain`. The metric resultity_receipts_of_another_class_total counts all.")
	ReplayUndecided       = networkEvent("66f700cb91d4486ebccf862821c470d5", "replay-undecided", "A job was given out again without a verdict", "The answers to job @RESULTITY_JOB@ could not be compared, or a node that was asked did not answer; the message says why. In one word, @RESULTITY_REASON@, of: no_answer (the first response is not a whole answer), model (the first answer is by another one, or its files were others), image (the engine's was another one), class (a node has signed for another class than it had named), no_class (the first node could not name its class), limits (the request is over those of now), api (the answer is of another API or model than the request asks for), seed (nobody knows with which one its tokens were drawn), tokens (the limit on them may have been another one), unanswered. It says nothing about the first answer. Where nodes have signed for another class than they had named, the findings in `resultity-network jobs replays --json` have their receipts. Repeat it with other nodes (--node).")
	NetworkReplayRefused  = networkEvent("7a28091e7a097b6bd01b94240d3c4f82", "job-replay-refused", "A job was not given out again", "Its operator wanted job @RESULTITY_JOB@ to be answered once more. Reason @RESULTITY_REASON@, of: malformed (what was asked cannot be read), no_result (it has not ended, has failed, or its result is gone), not_kept (keep_requests_bytes of network.toml, or --request), request (what was given is not the one of the receipt), no_node (none of the class is ready, or not the one that --node names), unanswered (whoever was asked), failed (the store, as a rule; or who has asked has gone). The message says more. Nothing was compared, and nothing is held against a node.")
	NodeSandboxUnrecorded = networkEvent("1915c4505b3ea5a000da2dca19efcfb6", "node-sandbox-unrecorded", "Receipts name a sandbox without a record", "Node @RESULTITY_NODE@ signs receipts that name a record of its sandbox which the network never got. Clients have their answers, and cannot see what they ran in. An agent that works sends the record before.")
	NodeLogContradicted   = networkEvent("942dafded5a9bf27374a993c37bf74f1", "node-receipt-log-contradicted", "A node has contradicted its receipt log", "Node @RESULTITY_NODE@ has signed two heads that cannot be of one log: it has taken back a receipt, or its key is held twice. Both heads are kept as evidence (`resultity-network nodes show`), and it gets no more jobs. If its operator has lost disks, `resultity-network nodes reset-log` has its log begin anew.")
	NodeLogReset          = networkEvent("c4b7b4e6a91f4f0b8d3c52e07a6f9d11", "node-receipt-log-reset", "The receipt log of a node begins anew", "By the network's operator, for the reason given: @RESULTITY_REASON@. What node @RESULTITY_NODE@ has signed of its log before is set aside, and kept (`resultity-network nodes show`). It takes this over in its next session, and gets jobs again. Each proof of the new log shows the reason.")
	NodeReceiptLeftOut    = networkEvent("250d820c5970ea2ad7fedb8e584ee15b", "node-receipt-left-out", "A receipt is not in its node's log", "Node @RESULTITY_NODE@ has not entered the receipt of job @RESULTITY_JOB@ into its log, though it had the time. The client has the receipt, and no proof that the node stands by it. Ask the node's operator; one who leaves receipts out does not mean to be counted.")
	ReceiptLogDamaged     = networkEvent("d167acfca4e84ec27f04e47e08f01553", "receipt-log-copy-damaged", "The copy of a node's receipt log is damaged", "What the store holds of the log of node @RESULTITY_NODE@ does not lead to the head that the node has signed. Nothing is proven by it; what can be made again is, of the rest of it and of what the node still has. The messages behind this one say what came of it. Somebody has changed the store, or its disk fails.")
)

// What is wrong with the service itself.
var (
	RequestsRefused      = networkEvent("5e01b79b04d1506913a729e0c3915798", "requests-refused", "No new requests are taken", "The store cannot write, or its disk is nearly full; the message says which. Requests that were taken are finished. Free some space on the disk of the store, or look at its file system: service goes on by itself.")
	ConfigurationFailed  = networkEvent("079bb5b05513011754cb5616b4c7be8c", "configuration-failed", "The published configuration cannot be used", "Nodes refuse it, or will as soon as it has expired, or this service has not taken it over; the message says which. Nodes go on with the one before. `resultity-network check` verifies what is published as nodes do and says what to do.")
	ConfigurationRunsOut = networkEvent("39f08ddf21762884e184f6f16084a34c", "configuration-runs-out", "A part of the published configuration runs out", "The role in the message has to be signed again, which takes the keys that this service does not have; the message has the command. Nodes refuse what has expired.")
	KeysExposed          = networkEvent("97b57f115789390d485c9330134cf3fc", "keys-exposed", "Keys lie where the service can read them", "The service does not need the files in the message. Whoever takes it over could configure every node with them: move them to other media, and give `resultity-network publish` the key with --key.")
)

// Catalogs lists the files of the journal's catalog.
var Catalogs = []struct {
	File, Page string
	Events     []*Event
}{
	{"resultity.catalog", "resultity-agent", Events},
	{"resultity-network.catalog", "resultity-network", NetworkEvents},
}
