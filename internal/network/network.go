// Package network owns the network service: the server side of the protocol in
// one process, with all of its state in an embedded NATS JetStream.
//
// The rule it keeps: what leaves the process is signed by a key that the
// published configuration lists, under the configuration that is published at
// that moment. It refuses to serve when it cannot keep that.
//
// # Parts
//
//	clients ──HTTPS──▶ gateway ──Work──▶ dispatch ──wire.Job──▶ nodes ──WebSocket──▶ agents
//	        ◀─────────         ◀─Ticket─          ◀─wire.Result─      ◀─────────────
//	                                       │
//	                                     store (durable: jobs, results, nodes, accounts, tokens, keys, mail, receipt logs)
//
//	gateway ◀──proofs── mirror ◀──Leaves, heads── nodes; and with the store beneath it
//
//	publish ──TUF repository──▶ agents; and to this process, which serves under it
//
// A disk that is full or takes no writes does not end the process (see package
// store): only a process that runs can tell clients so, keep the sessions of nodes
// and the results that wait, and go on within a second when there is room. Clients
// get 503 with Retry-After meanwhile, and nodes keep what is not acknowledged.
//
// Damage to the store's files is mended, or set aside and said, by package store; what
// nodes have, as their receipt logs, is had from them again. Where JetStream hangs over it,
// [Run] ends with an error and is to be started again.
//
// Sessions and dispatch are in memory, everything that must outlive the process
// is in the store. So a restart costs the connections of clients and nodes and
// nothing else, and more processes over one store would need no other design:
// each would hold the sessions that it accepted.
//
// # Files
//
//	DIR/publish.json, keys, repository   see package publish; of the keys, snapshot and timestamp are used
//	DIR/keys/message.key                 signs for the network; 0600
//	DIR/store                            JetStream; 0700
//	DIR/admin.sock                       for the commands of the operator; 0600
package network

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/gateway"
	"github.com/resultity/node/internal/network/mail"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/mirror"
	"github.com/resultity/node/internal/network/nodes"
	"github.com/resultity/node/internal/network/orders"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/version"
	"github.com/resultity/node/internal/wire"
)

// service is a running network service.
type service struct {
	cfg      Config
	log      *slog.Logger
	key      *evm.Key
	store    *store.Store
	dispatch *dispatch.Dispatcher
	metrics  *metrics.Metrics
	nodes    *nodes.Manager
	mirror   *mirror.Mirror
	sender   *mail.Sender // nil where no mail is sent
	outbox   *mail.Outbox // likewise
	orders   *orders.Desk

	// expiries are of what is published, as verify has seen it last.
	expiries atomic.Pointer[[]publish.Expiry]

	seen string // stamp of what was published when it was last looked at; of Run, then of watch

	// mu is held while a configuration is taken over.
	mu    sync.Mutex
	stale error // why the published configuration is not the active one, or nil
}

// Run serves until ctx ends, then lets requests go on for [Config.Drain] and
// returns nil. It leaves nothing running.
func Run(ctx context.Context, cfg Config, log *slog.Logger) (err error) {
	if err := cfg.check(); err != nil {
		return err
	}
	s := &service{cfg: cfg, log: log}
	if s.key, err = readMessageKey(cfg.Dir); err != nil {
		return err
	}
	s.warnOfKeys()
	snap, err := s.published()
	if err != nil {
		return err
	}
	tlsConfig, err := cfg.tls()
	if err != nil {
		return err
	}
	if s.sender, err = cfg.mailer(); err != nil {
		return err
	}
	if s.store, err = store.Open(ctx, filepath.Join(cfg.Dir, "store"), log); err != nil {
		return err
	}
	defer s.store.Close()
	if err := s.begin(ctx, snap); err != nil {
		return err
	}
	// The store is swept once more after the dispatcher's last word.
	sweeping, endSweep := context.WithCancel(context.WithoutCancel(ctx))
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var sweeper sync.WaitGroup
	sweeper.Go(func() {
		stop(s.store.Run(sweeping, log, func(n uint64) { s.metrics.Discarded.Add(float64(n)) }))
	})
	defer sweeper.Wait()
	defer endSweep()
	defer s.dispatch.Close()
	defer s.mirror.Close()

	listener, err := listen("listen", cfg.Listen)
	if err != nil {
		return err
	}
	front, _ := parseProxies(cfg.TrustedProxies) // has been checked
	listener = newCrowd(listener, cfg.MaxConnections, front, s.metrics.Crowded, log.With("of", "clients and nodes"))
	if tlsConfig != nil {
		listener = tls.NewListener(listener, tlsConfig)
	}
	defer listener.Close() // serve has closed it already, if it came to that
	var watched net.Listener
	if cfg.MetricsListen != "" {
		if watched, err = listen("metrics_listen", cfg.MetricsListen); err != nil {
			return err
		}
		defer watched.Close() // likewise
		watched = newCrowd(watched, maxWatchers, nil, s.metrics.Crowded, log.With("of", "metrics"))
	}
	admin, err := s.listenAdmin()
	if err != nil {
		return err
	}
	defer admin.Close() // likewise
	admin = newCrowd(admin, maxCommands, nil, s.metrics.Crowded, log.With("of", "commands"))
	err = s.serve(ctx, listener, watched, admin)
	if stuck := context.Cause(ctx); err == nil && errors.Is(stuck, store.ErrFailed) {
		return stuck // and is started anew
	}
	return err
}

// Bounds of connections: for metrics, and of the operator's commands. A command that
// waits keeps its own.
const (
	maxWatchers = 64
	maxCommands = 64
)

// listen sorts what can go wrong with an address: one that is in use may be free a
// moment later.
func listen(key, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s: %w: another program has the port (ss -ltnp 'sport = %s' names it as root), maybe another resultity-network: stop that, or set %[1]s", key, err, address[strings.LastIndexByte(address, ':'):])
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %w", ErrConfig, key, err)
	}
	return l, nil
}

// begin makes the parts, and takes over the jobs of the run before.
func (s *service) begin(ctx context.Context, snap *snapshot.Snapshot) error {
	// A request is written down in base64 with a little beside it, and deleted
	// some time after its end.
	want := store.Limits{Jobs: 64<<20 + 4*s.cfg.MaxQueuedBytes, Results: s.cfg.MaxResultsBytes, Requests: s.cfg.KeepRequestsBytes, Free: s.cfg.MinFreeBytes}
	limits, err := s.store.SetLimits(ctx, want)
	if err != nil {
		return err
	}
	if limits != want {
		s.log.Warn("the file system of the store is small for what it may have to hold", "wanted", want, "allowed", limits)
	}
	terms, err := s.terms(ctx, snap)
	if err != nil {
		return err
	}
	s.verify(true)
	s.metrics = metrics.New(func() metrics.State {
		m, st := s.dispatch.State(), s.store.State()
		m.StoreFree, m.StoreAccepting, m.StoreReopened = st.Free, st.Err == nil, st.Reopened
		m.StoreDamaged, m.StoreLost = s.store.Damaged(), len(s.store.Lost())
		for _, l := range s.mirror.States() {
			m.Unlogged += l.Waiting
			m.Overdue += l.Overdue
		}
		m.MetadataExpires = map[string]time.Time{}
		for _, e := range *s.expiries.Load() {
			m.MetadataExpires[e.Role] = e.Expires
		}
		m.Odd, m.Disputed = s.nodes.Classes().Count()
		return m
	})
	s.dispatch = dispatch.New(s.store, terms, s.metrics, s.log, dispatch.Options{
		MaxQueued: s.cfg.MaxQueued, MaxBytes: s.cfg.MaxQueuedBytes, Share: s.cfg.KeyShare, NoNodeWait: s.cfg.NodeWait,
	})
	jobs, err := s.store.Jobs(ctx, func(seq uint64, err error) {
		s.log.Error("job in the store cannot be read and is passed over", "seq", seq, "error", err)
	})
	if err == nil {
		err = s.dispatch.Restore(ctx, jobs, s.formerTerms)
	}
	if err != nil {
		s.dispatch.Close()
		return err
	}
	if len(jobs) > 0 {
		s.log.Info("jobs of the run before", "count", len(jobs))
	}
	s.orders, err = orders.Open(ctx, s.store, s.key, terms.Config.Network.Name, func(a evm.Address, m wire.Message) { s.nodes.Send(a, m) })
	if err != nil {
		s.dispatch.Close()
		return err
	}
	opt := nodes.Options{MaxSessions: s.cfg.MaxSessions, MaxArriving: s.cfg.MaxArrivingBytes, Open: s.cfg.Registration == "open"}
	if s.sender != nil {
		if s.outbox, err = mail.NewOutbox(ctx, s.store, s.mail, func(outcome string) { s.metrics.Mails.WithLabelValues(outcome).Inc() }, s.log); err != nil {
			s.dispatch.Close()
			return err
		}
		opt.Outbox = s.outbox
	}
	s.mirror = mirror.New(s.store, func() mirror.Terms {
		n := s.dispatch.Terms().Config.Network
		return mirror.Terms{Network: n.Name, ChainID: n.ChainID, Heartbeat: n.Heartbeat.Duration(), Clock: n.ClockWindow.Duration()}
	}, s.key, s.metrics, s.log, s.dispatch.SetOut)
	s.nodes = nodes.New(s.store, s.dispatch, s.orders, s.mirror, s.key, version.String(), s.metrics, s.log, opt)
	return nil
}

// serve ends the listeners; watched, for metrics, may be nil.
func (s *service) serve(ctx context.Context, listener, watched, admin net.Listener) error {
	server := s.server(s.handler())
	adminServer := &http.Server{Handler: s.adminHandler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}

	// Sessions outlive ctx by the time that requests are given to end.
	sessions, endSessions := context.WithCancel(context.WithoutCancel(ctx))
	defer endSessions()
	group, ctx := errgroup.WithContext(ctx)
	serve := func(srv *http.Server, l net.Listener) func() error {
		return func() error {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		}
	}
	group.Go(serve(server, listener))
	group.Go(serve(adminServer, admin))
	var metricsAddr net.Addr
	metricsServer := s.server(s.metricsHandler())
	if watched != nil {
		metricsAddr = watched.Addr()
		group.Go(serve(metricsServer, watched))
	}
	group.Go(func() error { return s.nodes.Run(sessions) })
	group.Go(func() error { return s.watch(ctx) })
	if s.outbox != nil {
		group.Go(func() error { return s.outbox.Run(ctx) })
	}
	group.Go(func() error {
		<-ctx.Done()
		s.log.Info("stopping", "drain", s.cfg.Drain)
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping) // nobody may be there to be told
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Drain)
		defer cancel()
		if server.Shutdown(drain) != nil {
			s.dispatch.Close() // answers whoever still waits
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			if server.Shutdown(last) != nil {
				_ = server.Close() // cuts whoever is left; it could only fail for the listener, which Shutdown has closed
			}
		}
		if err := adminServer.Close(); err != nil {
			s.log.Warn("admin socket was not removed", "error", err)
		}
		_ = metricsServer.Close() // cuts who reads: it could only fail for the listener
		s.dispatch.Close()
		endSessions()
		return nil
	})
	t := s.dispatch.Terms()
	s.log.Info("serving", "network", t.Config.Network.Name, "address", listener.Addr().String(), "metrics", metricsAddr, "config", t.Digest, "version", t.Version, "key", s.key.Address())
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // likewise
	if s.cfg.Ready != nil {
		s.cfg.Ready(listener.Addr(), metricsAddr)
	}
	return group.Wait()
}

// server serves strangers.
func (s *service) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // failed handshakes of strangers
	}
}

func (s *service) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.metrics.Handler())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inTime(w)
		mux.ServeHTTP(w, r)
	})
}

func (s *service) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/tuf/", http.StripPrefix("/tuf", publish.Handler(s.cfg.Dir)))
	mux.HandleFunc("POST "+wire.RegisterPath, s.nodes.ServeRegister)
	mux.HandleFunc("POST "+wire.BindPath, s.nodes.ServeBinding)
	mux.HandleFunc("GET "+wire.SessionPath, s.nodes.ServeSession)
	mux.Handle("/v1/", gateway.New(s.store, s.dispatch, s.mirror, s.metrics, s.log, gateway.Options{
		MaxUploadBytes: s.cfg.MaxUploadBytes, Share: s.cfg.KeyShare,
	}))
	mux.HandleFunc("GET /healthz", s.healthz)
	front, _ := parseProxies(s.cfg.TrustedProxies) // has been checked
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = front.client(r)
		inTime(w) // what takes longer sets its own deadlines, and a WebSocket clears them
		mux.ServeHTTP(w, r)
	})
}

// inTime bounds a request and its answer. For each one, since a deadline stays with a
// connection that is used again. It fails on a closed connection only, and then so
// does all else.
func inTime(w http.ResponseWriter) {
	rc, at := http.NewResponseController(w), time.Now().Add(smallTimeout)
	_ = rc.SetReadDeadline(at)
	_ = rc.SetWriteDeadline(at)
}

// smallTimeout is how long a client may take to send a small request, and to
// read a small answer.
const smallTimeout = 30 * time.Second

// mail sends one message with a code.
func (s *service) mail(ctx context.Context, m store.Mail) error {
	name := s.dispatch.Terms().Config.Network.Name
	return s.sender.Send(ctx, m.To, "Your code for a node of "+name, fmt.Sprintf(
		"%s\n\nis the code that binds node\n\n%s\n\nof network %s to this address. On the node, enter:\n\n    resultityctl bind --code %[1]s\n\n"+
			"It is good until %[4]s. If this was not you, do nothing.\n",
		nodes.NewCodes(s.key).Of(m.Seed, m.Node), m.Node.Hex(), name, time.UnixMilli(m.Expires).UTC().Format("15:04 MST")))
}

// healthz answers whether this process can do its work. Having no nodes is no
// fault of its own. It is public: files, disks and keys are for the log, which has
// had all of it from whoever met it.
func (s *service) healthz(w http.ResponseWriter, _ *http.Request) {
	why := ""
	switch t := s.dispatch.Terms(); {
	case s.unwell() != nil:
		why = "the published configuration was not taken over"
	case s.store.Accepting() != nil:
		why = "no requests are taken: the store cannot write"
	case time.Now().After(t.Expires):
		why = "the signature of the configuration expired at " + t.Expires.UTC().Format(time.RFC3339)
	}
	if why != "" {
		http.Error(w, why+"; the log says more", http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("ok\n")) // who has gone needs no answer
}

// warnOfKeys says which keys this process could read and does not need: whoever
// takes it over could configure every node with them.
func (s *service) warnOfKeys() {
	exposed, err := publish.Exposed(s.cfg.Dir)
	if err != nil {
		s.log.Warn("keys could not be looked at", "error", err)
	}
	if len(exposed) > 0 {
		s.log.Warn("root and targets keys are within reach of the service, which does not need them; keep them on other media and give publish the targets key with --key", journal.KeysExposed.Attr(), "files", exposed)
	}
}

// published renews the timestamp and returns the configuration that is
// published. It must list the key that this process signs with.
func (s *service) published() (*snapshot.Snapshot, error) {
	if _, err := publish.Refresh(s.cfg.Dir); errors.Is(err, publish.ErrNothing) {
		return nil, fmt.Errorf("%w: dir: %w; run resultity-network publish --dir %s --config config.json first", ErrConfig, err, s.cfg.Dir)
	} else if err != nil {
		// The timestamp's key may be kept by somebody else, who renews it.
		s.log.Warn("timestamp was not renewed", "error", err)
	}
	s.seen = s.stamp() // before it is read: what is published meanwhile is a change
	snap, err := publish.Current(s.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("published configuration: %w", err)
	}
	return snap, s.listed(snap)
}

func (s *service) listed(snap *snapshot.Snapshot) error {
	return listsKey(snap.Config(), s.key.Address())
}

func listsKey(c *snapshot.Config, key evm.Address) error {
	if slices.Contains(c.Network.MessageKeys, key) {
		return nil
	}
	return fmt.Errorf("%w: network.message_keys of the published configuration does not list %s, the address of this service's message key; nodes would refuse its frames: publish a configuration that lists it", ErrConfig, key.Hex())
}

// terms keeps a configuration for later and puts it into the terms of dispatch.
func (s *service) terms(ctx context.Context, snap *snapshot.Snapshot) (*dispatch.Terms, error) {
	raw, err := configOf(s.cfg.Dir, snap)
	if err != nil {
		return nil, err
	}
	at, err := s.store.PutConfig(ctx, raw)
	if err != nil {
		return nil, err
	}
	if err := s.store.SetResultTTL(ctx, snap.Config().Limits.ResultTTL.Duration()); err != nil {
		return nil, err
	}
	return dispatch.NewTerms(snap.Config(), snap.Digest(), snap.Version(), at, snap.Expires())
}

// configOf reads the exact bytes of a configuration from the repository.
func configOf(dir string, snap *snapshot.Snapshot) ([]byte, error) {
	raw, err := durable.ReadFile(filepath.Join(dir, "repository", "targets", snap.Digest().Hex()+"."+snapshot.Target), snapshot.MaxSize)
	if err != nil {
		return nil, err
	}
	return raw, snap.Digest().Check(raw)
}

// formerTerms finds a configuration that was published once.
func (s *service) formerTerms(ctx context.Context, d digest.Digest) (*dispatch.Terms, error) {
	raw, err := s.store.Config(ctx, d)
	if err != nil {
		return nil, err
	}
	c, err := snapshot.Parse(raw)
	if err != nil {
		return nil, err
	}
	return dispatch.NewTerms(c, d, 0, time.Time{}, time.Time{})
}

// watchEvery is how often the repository is looked at: somebody may publish
// from another machine and copy the files.
const watchEvery = 2 * time.Second

// verifyEvery is how often all of what is published is verified, for the metrics: a
// root can be published without anything else.
const verifyEvery = time.Minute

// warnEvery is how often the log says that something runs out.
const warnEvery = 24 * time.Hour

// retryRenewal is how soon a renewal that failed is tried again.
const retryRenewal = 30 * time.Second

// verify looks at what is published as nodes do. With warn it says what only people
// can renew, well before it runs out, and what nodes would refuse now.
func (s *service) verify(warn bool) {
	list, err := publish.Check(s.cfg.Dir)
	s.expiries.Store(&list)
	if !warn {
		return
	}
	if err != nil {
		s.log.Error("nodes refuse what is published", journal.ConfigurationFailed.Attr(), "error", err)
	}
	for _, e := range list {
		if e.Due {
			s.log.Warn("metadata runs out", journal.ConfigurationRunsOut.Attr(), "role", e.Role, "version", e.Version, "expires", e.Expires.UTC().Format(time.RFC3339), "remedy", e.Remedy())
		}
	}
}

// watch renews the timestamp on schedule, says what it cannot renew, takes over
// what is published, and tells the service manager how things are.
func (s *service) watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	renew := time.Now().Add(s.renewIn())
	const well = "serving"
	told := well
	verified := time.Now() // by begin
	warned := verified
	for {
		if now := time.Now(); now.Sub(verified) >= verifyEvery {
			warn := now.Sub(warned) >= warnEvery
			s.verify(warn)
			if verified = now; warn {
				warned = now
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog) // nobody may be there to be told
		status := well
		if err := s.store.Accepting(); err != nil {
			status = "takes no new requests: " + strings.ReplaceAll(err.Error(), "\n", " ")
		}
		if status != told {
			told = status
			_, _ = daemon.SdNotify(false, "STATUS="+status) // likewise
		}
		if !time.Now().Before(renew) {
			if _, err := publish.Refresh(s.cfg.Dir); err != nil {
				s.log.Error("timestamp was not renewed; nodes refuse the configuration once it has expired", journal.ConfigurationFailed.Attr(), "error", err)
				renew = time.Now().Add(max(s.renewIn(), retryRenewal))
			} else {
				renew = time.Now().Add(s.renewIn())
			}
		}
		if now := s.stamp(); now != s.seen {
			s.seen, verified = now, time.Time{}
			if err := s.reload(ctx); err != nil {
				s.log.Error("published configuration was not taken over", journal.ConfigurationFailed.Attr(), "error", err)
			}
			renew = time.Now().Add(s.renewIn())
		} else if s.unwell() != nil {
			_ = s.reload(ctx) // somebody may be copying the files: the rest comes later. What is wrong has been said
		}
	}
}

// renewIn is a third of the time that the timestamp has left.
func (s *service) renewIn() time.Duration {
	return max(watchEvery, time.Until(s.dispatch.Terms().Expires)/3)
}

// stamp tells one timestamp.json from another.
func (s *service) stamp() string {
	st, err := os.Stat(filepath.Join(s.cfg.Dir, "repository", "metadata", "timestamp.json"))
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(st.ModTime().UnixNano(), st.Size(), st.Sys().(*syscall.Stat_t).Ino)
}

// unwell says why the published configuration is not the active one, or nil.
func (s *service) unwell() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stale
}

// reload takes over what is published now.
func (s *service) reload(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stale = func() error {
		snap, err := publish.Current(s.cfg.Dir)
		if err != nil {
			return err
		}
		if err := s.listed(snap); err != nil {
			return err
		}
		if old := s.dispatch.Terms(); snap.Version() < old.Version {
			return fmt.Errorf("repository went back from version %d to %d", old.Version, snap.Version())
		}
		terms, err := s.terms(ctx, snap)
		if err != nil {
			return err
		}
		if old := s.dispatch.Terms(); old.Digest != terms.Digest {
			s.log.Info("new configuration", "config", terms.Digest, "version", terms.Version)
		}
		s.dispatch.Configure(terms)
		return nil
	}()
	return s.stale
}
