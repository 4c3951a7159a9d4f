// Package faults breaks things under a running system and looks at what is
// left: on real hosts, with real services, while clients ask without pause.
//
// It owns the list of faults, and for each what must be true after it. The rule
// it keeps: whatever breaks, no client gets a wrong answer, no answer is counted
// twice, nothing that was accepted is lost, and nobody has to lend a hand. A
// fault that takes nothing but one node away is not even noticed by a client.
package faults
