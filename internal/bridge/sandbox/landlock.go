package sandbox

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"
)

// Landlock's system calls, and names of its, which the syscall package does not
// have. The numbers are the same on all architectures.
const (
	landlockCreateRuleset = 444
	landlockAddRule       = 445
	landlockRestrictSelf  = 446

	rulesetVersion = 1 // flag: tell the version
	pathBeneath    = 1 // type of rule

	writeFile = 1 << 1
	refer     = 1 << 13 // move and link between directories
	truncate  = 1 << 14 // from version 3 on
	// changes are the rights to make and to remove what a directory holds.
	changes = 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<9 | 1<<10 | 1<<11 | 1<<12 | refer

	scopeAbstractSockets = 1 << 0 // from version 6 on
	scopeSignals         = 1 << 1

	oPath = 0x200000
)

// oldestLandlock is the first version that can be told to let files move
// between directories, which engines do in their caches.
const oldestLandlock = 2

// restrictWrites takes from the calling thread, for ever, the right to change
// any file but below o.Writable and through device nodes, and with it the one to
// trace or, from version 6 on, to signal what is not restricted like it. It
// returns the version of Landlock that does so, 0 where the kernel has none.
func restrictWrites(o Order) (version int, err error) {
	v, _, errno := syscall.RawSyscall(landlockCreateRuleset, 0, 0, rulesetVersion)
	switch {
	case errno == syscall.ENOSYS, errno == syscall.EOPNOTSUPP, errno == syscall.EPERM: // none, off, or unknown to Podman
		return 0, nil
	case errno != 0:
		return 0, fmt.Errorf("landlock: %w", errno)
	case v < oldestLandlock:
		return 0, nil
	}
	version = int(v)
	var attr struct{ files, network, scopes uint64 }
	file := uint64(writeFile)
	if version >= 3 {
		file |= truncate
	}
	if version >= 6 {
		attr.scopes = scopeAbstractSockets | scopeSignals
	}
	attr.files = file | changes
	fd, _, errno := syscall.RawSyscall(landlockCreateRuleset, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return 0, fmt.Errorf("landlock: %w", errno)
	}
	defer syscall.Close(int(fd))
	allow := func(path string, rights uint64) {
		if err == nil {
			err = landlockAllow(int(fd), path, rights)
		}
	}
	for _, dir := range o.Writable {
		allow(dir, attr.files)
	}
	// Nodes to be opened, nothing to be made; and what processes tell the kernel
	// of themselves, such as the names of their threads.
	for _, path := range append([]string{"/dev", "/proc"}, o.Devices...) {
		allow(path, file)
	}
	if err != nil {
		return 0, err
	}
	if _, _, errno := syscall.RawSyscall(landlockRestrictSelf, fd, 0, 0); errno != 0 {
		return 0, fmt.Errorf("landlock: %w", errno)
	}
	return version, nil
}

// landlockAllow gives rights at and below path, if there is such a path.
func landlockAllow(ruleset int, path string, rights uint64) error {
	fd, err := syscall.Open(path, oPath|syscall.O_CLOEXEC, 0)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("landlock: %s: %w", path, err)
	}
	defer syscall.Close(fd)
	rule := struct {
		rights uint64
		fd     int32
	}{rights, int32(fd)}
	if _, _, errno := syscall.RawSyscall6(landlockAddRule, uintptr(ruleset), pathBeneath, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("landlock: %s: %w", path, errno)
	}
	return nil
}
