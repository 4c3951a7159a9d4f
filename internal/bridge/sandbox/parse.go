package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/bridge/contract"
)

// status is the part of /proc/self/status that is about privileges. What a
// line is missing for stays empty and fails its check.
type status struct {
	UID, GID            [4]int // real, effective, saved, file system
	Groups              []int
	Caps                map[string]string // by name, sixteen hexadecimal digits
	NoNewPrivs, Seccomp string
}

var capSets = []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"}

// capabilities lists the sets that are not empty.
func (s status) capabilities() []string {
	var got []string
	for _, name := range capSets {
		if v := s.Caps[name]; v == "" || strings.Trim(v, "0") != "" {
			got = append(got, fmt.Sprintf("%s %q", name, v))
		}
	}
	return got
}

// unconfined says what a process has that one like self has not, "" for nothing.
func (s status) unconfined(self status) string {
	switch {
	case s.UID != self.UID || s.GID != self.GID:
		return "user " + ids(s.UID) + ", group " + ids(s.GID)
	case len(s.capabilities()) > 0:
		return "capabilities " + strings.Join(s.capabilities(), " ")
	case s.NoNewPrivs != "1":
		return "no_new_privs " + s.NoNewPrivs
	case s.Seccomp != "2":
		return "seccomp mode " + s.Seccomp
	}
	return ""
}

// parseCgroup returns the path in the unified hierarchy.
func parseCgroup(text string) string {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	return ""
}

func parseStatus(text string) (status, error) {
	s := status{Caps: make(map[string]string)}
	var errs []error
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch {
		case key == "Uid":
			errs = append(errs, numbers(value, s.UID[:]))
		case key == "Gid":
			errs = append(errs, numbers(value, s.GID[:]))
		case key == "Groups":
			s.Groups = make([]int, len(strings.Fields(value)))
			errs = append(errs, numbers(value, s.Groups))
		case slices.Contains(capSets, key):
			s.Caps[key] = value
		case key == "NoNewPrivs":
			s.NoNewPrivs = value
		case key == "Seccomp":
			s.Seccomp = value
		}
	}
	return s, errors.Join(errs...)
}

func numbers(text string, into []int) error {
	fields := strings.Fields(text)
	if len(fields) != len(into) {
		return fmt.Errorf("%q: want %d numbers", text, len(into))
	}
	for i, f := range fields {
		n, err := strconv.Atoi(f)
		if err != nil {
			return err
		}
		into[i] = n
	}
	return nil
}

// parseIDMap reads /proc/self/uid_map or gid_map.
func parseIDMap(text string) ([]contract.IDRange, error) {
	var m []contract.IDRange
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return nil, fmt.Errorf("%q: want three numbers", line)
		}
		var v [3]uint32
		for i, f := range fields {
			n, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil, err
			}
			v[i] = uint32(n)
		}
		m = append(m, contract.IDRange{Inside: v[0], Outside: v[1], Size: v[2]})
	}
	return m, nil
}

// mount is one line of /proc/self/mountinfo.
type mount struct {
	ID       int
	Point    string
	Type     string
	ReadOnly bool // the mount or the file system is
}

func parseMounts(text string) ([]mount, error) {
	var all []mount
	for line := range strings.Lines(text) {
		// 36 35 98:0 /root /point rw,noatime shared:1 - ext3 /dev/root rw
		mine, theirs, ok := strings.Cut(strings.TrimSpace(line), " - ")
		a, b := strings.Fields(mine), strings.Fields(theirs)
		if !ok || len(a) < 6 || len(b) < 3 {
			return nil, fmt.Errorf("%q: not a line of mountinfo", line)
		}
		id, err := strconv.Atoi(a[0])
		if err != nil {
			return nil, err
		}
		point, err := unescape(a[4])
		if err != nil {
			return nil, err
		}
		all = append(all, mount{
			ID:       id,
			Point:    point,
			Type:     b[0],
			ReadOnly: hasOption(a[5], "ro") || hasOption(b[2], "ro"),
		})
	}
	return all, nil
}

func hasOption(options, want string) bool {
	return slices.Contains(strings.Split(options, ","), want)
}

// unescape undoes the kernel's \040 and the like.
func unescape(s string) (string, error) {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(s, `\`)
		b.WriteString(before)
		if !found {
			return b.String(), nil
		}
		if len(after) < 3 {
			return "", fmt.Errorf("%q: cut escape", s)
		}
		c, err := strconv.ParseUint(after[:3], 8, 8)
		if err != nil {
			return "", err
		}
		b.WriteByte(byte(c))
		s = after[3:]
	}
}

// parseRoutes returns the destinations in /proc/net/route that are not routed
// over lo.
func parseRoutes(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 1 && f[0] != "Iface" && f[0] != "lo" {
			out = append(out, f[1]+" over "+f[0])
		}
	}
	return out
}

// parseRoutes6 does the same for /proc/net/ipv6_route.
func parseRoutes6(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 10 && f[9] != "lo" {
			out = append(out, f[0]+" over "+f[9])
		}
	}
	return out
}

// parseUnix returns the abstract sockets in /proc/net/unix. They belong to the
// network namespace: one of its own has none, and the host's has the host's.
func parseUnix(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		// Num RefCount Protocol Flags Type St Inode Path; the path may hold anything.
		if f := strings.Fields(line); len(f) > 7 && strings.HasPrefix(f[7], "@") {
			out = append(out, f[7])
		}
	}
	return out
}
