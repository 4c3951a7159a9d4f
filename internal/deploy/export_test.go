package deploy

// For tests, which are outside of the package: they use deploytest, which imports it.
const (
	LookTimeout = lookTimeout
	StopTimeout = stopTimeout
)
