package network

// MaxAsked is for the tests that see the service from outside.
const MaxAsked = maxAsked
