// Package dispatch owns the jobs of a network between a client and its nodes:
// which node gets which job, when a job goes to another node, which result
// counts, and what the client is told.
//
// The rule it keeps: the first valid result of a job is the only one that
// counts, and nobody is told of it before it is safe. A client gets the end of
// its answer when a crash could not take the receipt any more, a node its
// acknowledgement when the result is on disk. Everything else is in memory and
// may be lost at any time.
//
// # Life of a job
//
//	Submit → queued → assigned → accepted → result checked → client answered → result durable → node acknowledged
//	   │        ▲          │                                     ▲
//	   │        └──────────┘ node lost, silent, too slow,        │
//	   │                     or refused                          │
//	   └───────────────── job durable ───────────────────────────┘
//
// # What is durable when
//
// A job is written down while a node works on it already, a result while its
// client reads it. Until its result is acknowledged a node keeps it and sends it
// again in each session, so that a record of the job is all that is needed for
// the result to count after a crash. Hence:
//
//   - The client is answered, or given the end mark of its stream, when the
//     result is checked and either the job or the result is durable.
//   - The node is acknowledged when the result is durable. From the answer on
//     [Dispatcher.Receipt] has the receipt, until the store has it.
//   - The record of a job is deleted when its result is durable, or when it
//     failed: both only once the record's own writing has ended.
//   - A job that cannot be written down ends with [Storage], and its node is told
//     to stop, unless a result is there by then and can be stored.
//   - A result that cannot be stored is tried again, and stays the one that
//     counts: it is kept in memory, its bytes part of [Options.MaxBytes].
//
// After a crash there may be a result of a job without a record: nobody was
// answered, so it is acknowledged and dropped, as one of a cancelled job is. A
// record without a result waits for its node before another one gets the job.
//
// A job is given to the least busy node that is routable (see [NodeStatus])
// and has a free slot. It goes back to the queue, ahead of younger jobs, when
//
//   - the session ended and did not come back within [Options.Grace],
//   - no heartbeat came within the window of the configuration,
//   - the node did not accept within [Options.Accept],
//   - the node accepted but showed no progress for a third of the job's time:
//     its first acceptance and chunks that go further are progress,
//   - the node refused or failed it, or
//   - the node broke the protocol.
//
// Nodes that had the job before are avoided as long as there are others. The
// first node is not told to stop: whoever delivers first is taken, and then the
// rest are told. A job ends at its deadline whatever happens.
//
// A client whose job surely no node has, since each that was given it has refused it,
// is told that there is none once no node has been routable for [Options.NoNodeWait],
// as if the job had never been given out. A node that has accepted a job, or may have
// and was cut off, is not believed when it refuses it: the job waits for its deadline.
//
// A node that says that no node could do a job is not believed alone, since the
// request was checked before: it takes a second one that says the same, or that
// there is no second one. The client reads our words for it, not the node's.
//
// # Replays
//
// The operator may have a job given out again, to another node that should compute
// the same, of another account if there is one, see [Replay]. What the node names as its
// class in its heartbeat is remembered with each job that it gets and stored with the
// result: a receipt may name another one. A replay waits for a slot of that node like any other job, goes
// to no other one, and does not take part in what is said above of records and
// clients: after a crash it has never been.
//
// # Streams
//
// Bytes go to the client as they come, from whichever node is furthest ahead;
// each node's bytes are compared with what was sent already. A node that
// contradicts them is out of the race; when no other is left in it, the
// client's stream ends with an error event, since bytes that were sent cannot
// be taken back. The end mark of a stream is held back until the result cannot
// be lost: a client that has read [DONE] can fetch the receipt.
package dispatch
