// Package dispatch owns the jobs of a network between a client and its nodes:
// which node gets which job, when a job goes to another node, which result
// counts, and what the client is told.
//
// The rule it keeps: a job is written down before any node sees it, a result
// before anybody is told of it, and the first valid result of a job is the only
// one that counts. Everything else is in memory and may be lost at any time.
//
// # Life of a job
//
//	Submit → durable → queued → assigned → accepted → result checked → durable → client answered, node acknowledged
//	                     ▲          │
//	                     └──────────┘ node lost, silent, too slow, or refused
//
// A job is given to the least busy node that is routable (see [NodeStatus])
// and has a free slot. It goes back to the queue, ahead of younger jobs, when
//
//   - the session ended and did not come back within [Options.Grace],
//   - no heartbeat came within the window of the configuration,
//   - the node did not accept within [Options.Accept],
//   - the node accepted but showed no progress for a third of the job's time,
//   - the node refused or failed it with a code that another node may not, or
//   - the node broke the protocol.
//
// Nodes that had the job before are avoided as long as there are others. The
// first node is not told to stop: whoever delivers first is taken, and then the
// rest are told. A job ends at its deadline whatever happens.
//
// # Streams
//
// Bytes go to the client as they come, from whichever node is furthest ahead;
// each node's bytes are compared with what was sent already. A node that
// contradicts them is out of the race; when no other is left in it, the
// client's stream ends with an error event, since bytes that were sent cannot
// be taken back. The end mark of a stream is held back until the result is
// durable: a client that has read [DONE] can fetch the receipt.
package dispatch
