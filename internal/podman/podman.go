// Package podman owns the connection to Podman's API service: what it runs on,
// images, and containers as Podman sees them.
//
// The rule it keeps: nothing else in the project speaks to Podman (but for
// preflight, which asks one question, also where no agent runs), and nothing at
// all runs the podman command. Images come and go by digest. Starting and
// stopping containers is systemd's work, so there is no method for it.
package podman

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blang/semver/v4"
	"github.com/containers/podman/v5/pkg/bindings"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/bindings/images"
	"github.com/containers/podman/v5/pkg/bindings/system"
	"github.com/containers/podman/v5/pkg/errorhandling"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// What Podman can answer.
var (
	// ErrUnavailable says that no service answers on the socket.
	ErrUnavailable = errors.New("podman's API service does not answer")
	// ErrRefused says that Podman's own policy does not let an image in; the
	// error keeps Podman's words.
	ErrRefused = errors.New("podman's policy refuses the image")
	// ErrOtherImage says that Podman stored something else than what was
	// asked for.
	ErrOtherImage = errors.New("podman stored another image")
	// ErrNotFound says that Podman has no such image or container.
	ErrNotFound = errors.New("podman does not have it")
	// ErrStalled says that a pull stood still.
	ErrStalled = errors.New("the pull stands still")
	// ErrInUse says that an image cannot be removed while a container needs it.
	ErrInUse = errors.New("a container needs it")
)

// Client is a connection to one API service. Its methods may be called
// concurrently, and end with their context.
type Client struct {
	socket string
	conn   context.Context // carries the bindings' connection and nothing else
	stall  time.Duration
	free   func(dir string) int64 // bytes of dir's file system
}

// quiet ends the bindings' habit of writing to stderr by themselves: whatever
// matters to a caller comes as an error.
var quiet = sync.OnceFunc(func() {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.PanicLevel)
})

// Dial connects to the service on a unix socket, given as an absolute path. A
// service that systemd starts on demand starts now.
func Dial(ctx context.Context, socket string) (*Client, error) {
	quiet()
	c := &Client{socket: socket, stall: pullStall, free: free}
	conn, err := bindings.NewConnection(ctx, (&url.URL{Scheme: "unix", Path: socket}).String())
	if err != nil {
		return nil, c.explain("connect", err)
	}
	c.conn = context.WithoutCancel(conn)
	return c, nil
}

// Close drops idle connections, so that a service that systemd started on
// demand can end.
func (c *Client) Close() {
	if conn, err := bindings.GetClient(c.conn); err == nil {
		conn.Client.CloseIdleConnections()
	}
}

// with gives ctx the connection.
func (c *Client) with(ctx context.Context) context.Context { return call{ctx, c.conn} }

// call has one context's life and another one's connection.
type call struct {
	context.Context
	conn context.Context
}

func (c call) Value(key any) any {
	if v := c.conn.Value(key); v != nil {
		return v
	}
	return c.Context.Value(key)
}

// Version is a version of Podman. A pre-release counts as the release: what
// Debian calls 5.8.2~rc1 has the keys of 5.8.2.
type Version struct{ Major, Minor, Patch int }

// String prints the three numbers.
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// AtLeast reports whether v is major.minor or later.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

func parseVersion(s string) (Version, error) {
	v, err := semver.ParseTolerant(s)
	if err != nil || max(v.Major, v.Minor, v.Patch) > 1<<20 {
		return Version{}, fmt.Errorf("podman says that its version is %.80q", s)
	}
	return Version{int(v.Major), int(v.Minor), int(v.Patch)}, nil
}

// Version returns the service's version.
func (c *Client) Version(ctx context.Context) (Version, error) {
	r, err := system.Version(c.with(ctx), nil)
	if err != nil {
		return Version{}, c.explain("version", err)
	}
	return parseVersion(r.Server.Version)
}

// Info is what Podman knows about the machine and its own place on it.
type Info struct {
	Version           Version
	OCIRuntime        string   // name and version
	GraphDriver       string   // overlay, where all is well
	GraphRoot         string   // where images are stored
	StorageFree       int64    // bytes of that file system
	CgroupVersion     string   // v2, where limits work
	CgroupControllers []string // that this user may use
	Rootless          bool
	AppArmor          bool
	Seccomp           bool
	SELinux           bool
	SubordinateUIDs   int64 // ids that containers may have beside the user's own
}

// Info asks for the service's view of the machine.
func (c *Client) Info(ctx context.Context) (Info, error) {
	r, err := system.Info(c.with(ctx), nil)
	if err != nil {
		return Info{}, c.explain("info", err)
	}
	if r.Host == nil || r.Store == nil {
		return Info{}, c.explain("info", errors.New("the answer is not complete"))
	}
	v, err := parseVersion(r.Version.Version)
	if err != nil {
		return Info{}, err
	}
	i := Info{
		Version:           v,
		GraphDriver:       r.Store.GraphDriverName,
		GraphRoot:         r.Store.GraphRoot,
		CgroupVersion:     r.Host.CgroupsVersion,
		CgroupControllers: r.Host.CgroupControllers,
		Rootless:          r.Host.Security.Rootless,
		AppArmor:          r.Host.Security.AppArmorEnabled,
		Seccomp:           r.Host.Security.SECCOMPEnabled,
		SELinux:           r.Host.Security.SELinuxEnabled,
	}
	if a, u := r.Store.GraphRootAllocated, r.Store.GraphRootUsed; a > u {
		i.StorageFree = int64(a - u)
	}
	if o := r.Host.OCIRuntime; o != nil {
		version, _, _ := strings.Cut(o.Version, "\n")
		i.OCIRuntime = strings.TrimSpace(version)
	}
	for _, m := range r.Host.IDMappings.UIDMap {
		if m.ContainerID > 0 {
			i.SubordinateUIDs += int64(m.Size)
		}
	}
	return i, nil
}

// Pull has Podman fetch an image and store it, under Podman's own policy,
// even if it is stored already. Progress gets Podman's words for people; nil
// drops them. An image that the policy refuses is [ErrRefused].
func (c *Client) Pull(ctx context.Context, ref snapshot.ImageRef, progress io.Writer) error {
	if progress == nil {
		progress = io.Discard
	}
	info, err := c.Info(ctx)
	if err != nil {
		return err
	}
	pctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := &watched{w: progress}
	watch := make(chan struct{})
	go func() {
		defer close(watch)
		c.watch(pctx, w, info.GraphRoot, cancel)
	}()
	opts := new(images.PullOptions).WithProgressWriter(w).WithPolicy("always")
	_, err = images.Pull(c.with(pctx), ref.String(), opts)
	cause := context.Cause(pctx)
	cancel(nil)
	<-watch
	switch {
	case errors.Is(cause, ErrStalled):
		return c.explain("pull "+ref.String(), cause)
	case err != nil:
		return c.explain("pull "+ref.String(), err)
	case ctx.Err() != nil: // a stream that was cut looks like one that ended
		return ctx.Err()
	}
	_, _, err = c.Image(ctx, ref)
	return err
}

// pullStall is how long a pull may stand still. Unpacking a large layer takes
// minutes on a slow disk, but it writes.
const pullStall = 5 * time.Minute

// pullFloor is how much a pull must write in that time at least, in bytes, to
// be told from what else is written on a machine.
const pullFloor = 4 << 20

// watched counts what a pull says.
type watched struct {
	w     io.Writer
	words atomic.Int64
}

func (w *watched) Write(p []byte) (int, error) {
	w.words.Add(1)
	return w.w.Write(p)
}

// watch ends a pull that stands still. Podman says when it begins with a layer
// and when it is done, and nothing in between; what goes on in between shows on
// the disks: on that of its temporary files, and then on that of its store.
// Somebody else's writing can make that late, and never wrong.
func (c *Client) watch(ctx context.Context, w *watched, store string, end context.CancelCauseFunc) {
	dirs := []string{store, "/var/tmp"}
	look := func() []int64 { return []int64{w.words.Load(), c.free(dirs[0]), c.free(dirs[1])} }
	tick := time.NewTicker(c.stall / 10)
	defer tick.Stop()
	last, since := look(), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := look()
		moved := now[0] != last[0]
		for i := range dirs {
			d := now[i+1] - last[i+1]
			moved = moved || d >= pullFloor || d <= -pullFloor
		}
		switch {
		case moved:
			last, since = now, time.Now()
		case time.Since(since) >= c.stall:
			end(fmt.Errorf("%w for %v: the registry, or the line to it, hangs", ErrStalled, c.stall))
			return
		}
	}
}

// free returns the free bytes of a file system, 0 where that cannot be told.
func free(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Bavail) * st.Bsize
}

// Image returns the id, 64 hexadecimal digits, and the size in bytes of the
// stored image whose manifest has exactly ref's digest and that came from ref's
// repository. [ErrNotFound] says that there is none.
func (c *Client) Image(ctx context.Context, ref snapshot.ImageRef) (id string, size int64, err error) {
	r, err := images.GetImage(c.with(ctx), ref.String(), nil)
	if err != nil {
		return "", 0, c.explain("image "+ref.String(), err)
	}
	if r.ImageData == nil {
		return "", 0, c.explain("image "+ref.String(), errors.New("the answer is empty"))
	}
	// Podman computes these from the manifests that it keeps. An index and the
	// manifest that was chosen from it are both in the list.
	if !slices.Contains(r.RepoDigests, ref.String()) {
		return "", 0, fmt.Errorf("%w: asked for %s, have %s with %q", ErrOtherImage, ref, r.Digest, r.RepoDigests)
	}
	return r.ID, r.Size, nil
}

// Has reports whether [Client.Image] finds ref. It fails where Podman does not say.
func (c *Client) Has(ctx context.Context, ref snapshot.ImageRef) (bool, error) {
	_, _, err := c.Image(ctx, ref)
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrOtherImage) {
		return false, nil
	}
	return err == nil, err
}

// ImageEnv returns the environment that a stored image asks for, NAME=value.
func (c *Client) ImageEnv(ctx context.Context, ref snapshot.ImageRef) ([]string, error) {
	r, err := images.GetImage(c.with(ctx), ref.String(), nil)
	if err != nil {
		return nil, c.explain("image "+ref.String(), err)
	}
	if r.ImageData == nil || r.Config == nil {
		return nil, c.explain("image "+ref.String(), errors.New("the answer is not complete"))
	}
	return r.Config.Env, nil
}

// Damage has Podman read its whole store, compare it with what was put there, and
// say what it found at ref's image; nil for nothing. A file with other content,
// one too many or one too few is damage. While Podman reads, at the disk's speed,
// it begins nothing else, and it does not stop when ctx ends.
func (c *Client) Damage(ctx context.Context, ref snapshot.ImageRef) ([]string, error) {
	id, _, err := c.Image(ctx, ref)
	if err != nil {
		return nil, err
	}
	r, err := system.Check(c.with(ctx), new(system.CheckOptions).WithQuick(false).WithRepair(false))
	if err != nil {
		return nil, c.explain("check "+ref.String(), err)
	}
	return append(r.Images[id], r.ROImages[id]...), nil
}

// RemoveImages removes those of the images in pulled that are not in keep.
// Pulled is the caller's record of what it has fetched itself; no other image
// is touched, and neither is one that a container needs, which is [ErrInUse].
// The images that are gone afterwards are returned, also with an error.
func (c *Client) RemoveImages(ctx context.Context, pulled, keep []snapshot.ImageRef) (gone []snapshot.ImageRef, err error) {
	kept := map[digest.Digest]bool{} // the same image may have come from two repositories
	for _, ref := range keep {
		kept[ref.Digest()] = true
	}
	var errs []error
	for _, ref := range pulled {
		if kept[ref.Digest()] {
			continue
		}
		// Forced removal would take containers along.
		_, failed := images.Remove(c.with(ctx), []string{ref.String()}, new(images.RemoveOptions).WithForce(false))
		err := c.explain("remove "+ref.String(), errors.Join(failed...))
		if err == nil || errors.Is(err, ErrNotFound) {
			gone = append(gone, ref)
			continue
		}
		if ctx.Err() != nil {
			return gone, ctx.Err()
		}
		errs = append(errs, err)
	}
	return gone, errors.Join(errs...)
}

// ContainerState is a container as Podman sees it.
type ContainerState struct {
	ID           string
	Running      bool
	PID          int // of the first process, on the host; 0 when not running
	ImageID      string
	ImageDigest  digest.Digest // of the manifest that it was made from; zero if there is none
	RestartCount int           // by Podman; systemd counts its own
	Started      time.Time
	ExitCode     int
	OOMKilled    bool
	Privileged   bool
	ReadOnly     bool     // the root file system
	Network      string   // "none", where it is sealed
	User         string   // and group, as ordered
	Capabilities []string // effective, bounding or added
	Security     []string // security options
	Hosts        []string // lines for /etc/hosts
	Command      []string
	Env          []string          // NAME=value
	Namespaces   map[string]string // mode of cgroup, ipc, pid, user and uts
	Devices      []string          // nodes, by their paths in the container
	Mounts       []Mount
	Tmpfs        map[string][]string // options, by place
}

// Mount is something of the host in a container.
type Mount struct {
	Type                string // "bind", or "volume" for one of Podman's own
	Source, Destination string
	Writable            bool
	Options             []string
}

// Container returns the state of a container; [ErrNotFound] if there is none.
func (c *Client) Container(ctx context.Context, name string) (ContainerState, error) {
	r, err := containers.Inspect(c.with(ctx), name, nil)
	if err != nil {
		return ContainerState{}, c.explain("container "+name, err)
	}
	if r.State == nil || r.HostConfig == nil {
		return ContainerState{}, c.explain("container "+name, errors.New("the answer is not complete"))
	}
	h := r.HostConfig
	s := ContainerState{
		ID:           r.ID,
		ImageID:      r.Image,
		Running:      r.State.Running,
		PID:          r.State.Pid,
		RestartCount: int(r.RestartCount),
		Started:      r.State.StartedAt,
		ExitCode:     int(r.State.ExitCode),
		OOMKilled:    r.State.OOMKilled,
		Privileged:   h.Privileged,
		ReadOnly:     h.ReadonlyRootfs,
		Network:      h.NetworkMode,
		Capabilities: slices.Concat(r.EffectiveCaps, r.BoundingCaps, h.CapAdd),
		Security:     h.SecurityOpt,
		Hosts:        h.ExtraHosts,
		Command:      append([]string{r.Path}, r.Args...),
		Namespaces:   map[string]string{"cgroup": h.CgroupMode, "ipc": h.IpcMode, "pid": h.PidMode, "user": h.UsernsMode, "uts": h.UTSMode},
		Tmpfs:        make(map[string][]string),
	}
	if r.Config != nil {
		s.User, s.Env = r.Config.User, r.Config.Env
	}
	for _, d := range h.Devices {
		s.Devices = append(s.Devices, d.PathInContainer)
	}
	for place, options := range h.Tmpfs {
		s.Tmpfs[place] = strings.Split(options, ",")
	}
	if r.ImageDigest != "" {
		if s.ImageDigest, err = digest.Parse(r.ImageDigest); err != nil {
			return ContainerState{}, c.explain("container "+name, err)
		}
	}
	for _, m := range r.Mounts {
		s.Mounts = append(s.Mounts, Mount{m.Type, m.Source, m.Destination, m.RW, m.Options})
	}
	return s, nil
}

// explain names what failed and sorts it by what the caller can do.
func (c *Client) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	var dial *net.OpError
	var connect bindings.ConnectError
	model, isModel := errors.AsType[*errorhandling.ErrorModel](err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
	case errors.As(err, &connect), errors.As(err, &dial):
		err = fmt.Errorf("%w on %s (%w): see systemctl --user status of the socket unit that owns it", ErrUnavailable, c.socket, err)
	case isModel && model.Code() == http.StatusNotFound:
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	// The removal of images and the stream of a pull bring errors as text alone.
	// These words are the same in all of Podman 5.
	case !isModel && strings.Contains(err.Error(), "image not known"):
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	case !isModel && strings.Contains(err.Error(), "in use by a container"):
		err = fmt.Errorf("%w: %w", ErrInUse, err)
	case !isModel && strings.Contains(err.Error(), "Source image rejected:"):
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("podman: %s: %w", what, err)
}
