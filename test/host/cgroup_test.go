package host

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestMountCgroups is about machines that have no cgroup2 tree mounted. Only
// the mounts of the first cgroup namespace set the kernel's options, so the
// test is in another.
func TestMountCgroups(t *testing.T) {
	err := thread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return err
		}
		root, err := mountCgroups()
		if err != nil {
			return err
		}
		defer root.Close()
		_, err = root.ReadFile("cgroup.procs")
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
