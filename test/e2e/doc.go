// Package e2e holds tests of the whole system on real hosts: what no single
// package can show. One stack serves all of them.
package e2e
