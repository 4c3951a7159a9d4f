// Package failpoint gives names to the instants at which a crash is most
// interesting: before and after something becomes durable, before and after
// somebody is told.
//
// The rule it keeps: without the build tag failpoint there is nothing of it in
// a program, neither code nor names. With the tag, a test has the process killed
// at a point of its choice; test/crash walks all of them. A name is
// package.what.when and stands at one place only.
//
// A program with the tag reads the file that RESULTITY_FAILPOINT names whenever
// it passes a point. The file holds the point at which to die, or several with
// ">" between them, to be passed in this order, the same one twice for its second
// passing. A point about a value is chosen by name and type, with a space
// between: "session.frame.written *wire.Accept". The process gives the file the
// suffix .reached and kills itself, so that its next start lives.
//
// Such a program also has a clock that can be set wrong, see [Now].
package failpoint
