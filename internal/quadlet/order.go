package quadlet

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containers/podman/v5/pkg/systemd/parser"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/snapshot"
)

// Order is what a container must turn out to have.
type Order struct {
	Image   snapshot.ImageRef
	User    string              // and group
	Mounts  []Mount             // of the host
	Tmpfs   map[string][]string // options, by place
	Bridge  contract.Options
	Command []string // the bridge's own, with its path
	Env     []string // NAME=value, beside the image's
	Memory  int64    // ceiling in bytes, 0 for none
}

// Mount is a file or directory of the host in the container.
type Mount struct {
	Source, Place string
	ReadOnly      bool
	Options       []string // those of the mount itself: nosuid, nodev, noexec
}

// Order reads from the unit, as Podman's generator will, what its container must
// turn out to have.
func (u Unit) Order() (Order, error) {
	fail := func(err error) (Order, error) { return Order{}, fmt.Errorf("what %s orders: %w", u.Name, err) }
	unit := parser.NewUnitFile()
	if err := unit.Parse(string(u.Text)); err != nil {
		return fail(err)
	}
	service, err := convert(unit)
	if err != nil {
		return fail(err)
	}
	argv, err := commandLine(service, "ExecStart")
	if err != nil {
		return fail(err)
	}
	have, rest, err := splitRun(argv)
	if err != nil {
		return fail(err)
	}
	if len(rest) == 0 || len(have["--user"]) != 1 {
		return fail(fmt.Errorf("no image or no user in %q", argv))
	}
	o := Order{User: have["--user"][0], Env: have["--env"], Tmpfs: make(map[string][]string), Command: append([]string{BridgeFile}, rest[1:]...)}
	if o.Image, err = snapshot.ParseImageRef(rest[0]); err != nil {
		return fail(err)
	}
	if o.Bridge, err = contract.Parse(rest[1:]); err != nil {
		return fail(err)
	}
	if v, ok := service.LookupLastRaw("Service", "MemoryMax"); ok {
		if o.Memory, err = strconv.ParseInt(v, 10, 64); err != nil {
			return fail(err)
		}
	}
	for _, v := range have["-v"] {
		parts := strings.SplitN(v, ":", 3)
		if len(parts) != 3 {
			return fail(fmt.Errorf("mount %q", v))
		}
		m := Mount{Source: parts[0], Place: parts[1]}
		for option := range strings.SplitSeq(parts[2], ",") {
			switch option {
			case "ro":
				m.ReadOnly = true
			case "rw", "z": // z is about labels, which the bridge's record has
			default:
				m.Options = append(m.Options, option)
			}
		}
		o.Mounts = append(o.Mounts, m)
	}
	for _, v := range have["--tmpfs"] {
		place, options, _ := strings.Cut(v, ":")
		o.Tmpfs[place] = strings.Split(options, ",")
	}
	return o, nil
}
