// Package rules holds the rules that the repository keeps about itself, as
// tests: import direction, purity, documentation, dependencies. Run them with
// -count=1, since they read the whole tree.
package rules
