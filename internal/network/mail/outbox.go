package mail

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/resultity/node/internal/network/store"
)

// keeper is where messages wait.
type keeper interface {
	PutMail(context.Context, store.Mail) error
	Mails(context.Context) (map[string]store.Mail, error)
	DeleteMail(ctx context.Context, id string) error
}

// delays between tries. A server that makes strangers wait (greylisting) takes a
// message after some minutes; it is of use for ten.
var delays = []time.Duration{2 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute}

const (
	senders    = 4               // messages on their way at once
	maxWaiting = 1000            // messages
	lastWords  = 5 * time.Second // for noting that a message was sent, also when the service ends
)

// ErrFull says that too many messages wait for a mail server.
var ErrFull = errors.New("too much mail waits to be sent")

// Outbox sends messages until a mail server has taken them or their time has run
// out. Safe for concurrent use.
type Outbox struct {
	keeper keeper
	send   func(context.Context, store.Mail) error
	count  func(outcome string)
	log    *slog.Logger
	wake   chan struct{} // capacity 1

	mu      sync.Mutex // guards waiting and what is in it, for the length of a look
	waiting map[string]*letter
}

type letter struct {
	store.Mail
	tries int
	next  time.Time
	busy  bool
}

// NewOutbox makes an outbox over what keeper has. send makes one try; its errors
// are logged, so they must not tell an address. count is told of each try:
// sent, failed, rejected, expired.
func NewOutbox(ctx context.Context, k keeper, send func(context.Context, store.Mail) error, count func(string), log *slog.Logger) (*Outbox, error) {
	mails, err := k.Mails(ctx)
	if err != nil {
		return nil, err
	}
	o := &Outbox{keeper: k, send: send, count: count, log: log, wake: make(chan struct{}, 1), waiting: map[string]*letter{}}
	for id, m := range mails {
		o.waiting[id] = &letter{Mail: m}
	}
	return o, nil
}

// Put takes a message: it is on disk when Put returns.
func (o *Outbox) Put(ctx context.Context, m store.Mail) error {
	o.mu.Lock()
	full := len(o.waiting) >= maxWaiting
	o.mu.Unlock()
	if full {
		return ErrFull
	}
	if err := o.keeper.PutMail(ctx, m); err != nil {
		return err
	}
	o.mu.Lock()
	o.waiting[m.ID] = &letter{Mail: m}
	o.mu.Unlock()
	o.poke()
	return nil
}

func (o *Outbox) poke() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// Run sends until ctx ends, and returns nil. What is not sent by then is sent
// after the next start.
func (o *Outbox) Run(ctx context.Context) error {
	var busy sync.WaitGroup
	defer busy.Wait()
	room := make(chan struct{}, senders)
	for {
		l, wait := o.due(time.Now())
		if l == nil {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-o.wake:
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		busy.Go(func() {
			defer func() { <-room; o.poke() }()
			o.try(ctx, l)
		})
	}
}

// due returns a message whose time has come, or how long there is none.
func (o *Outbox) due(now time.Time) (*letter, time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	wait := time.Hour
	for _, l := range o.waiting {
		if l.busy {
			continue
		}
		if d := l.next.Sub(now); d > 0 {
			wait = min(wait, d)
			continue
		}
		l.busy = true
		return l, 0
	}
	return nil, wait
}

// try makes one try and decides what follows from it.
func (o *Outbox) try(ctx context.Context, l *letter) {
	outcome := "expired"
	var err error
	if time.Now().UnixMilli() < l.Expires {
		switch err = o.send(ctx, l.Mail); {
		case err == nil: // also where the service ends meanwhile
			outcome = "sent"
		case ctx.Err() != nil: // cut short by that
			return
		case errors.Is(err, ErrRejected):
			outcome = "rejected"
		default:
			outcome = "failed"
		}
	}
	o.count(outcome)
	log := o.log.With("mail", l.ID, "node", l.Node, "try", l.tries+1)
	if outcome == "failed" {
		d := delays[min(l.tries, len(delays)-1)]
		o.mu.Lock()
		l.busy, l.next = false, time.Now().Add(d/2+rand.N(d))
		l.tries++
		o.mu.Unlock()
		log.Warn("mail not sent yet; it is tried again", "error", err)
		return
	}
	if outcome == "sent" {
		log.Info("mail sent")
	} else {
		log.Error("mail given up", "reason", outcome, "error", err)
	}
	// If this fails it is sent once more after a restart, with the same code.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWords)
	defer cancel()
	if err := o.keeper.DeleteMail(last, l.ID); err != nil {
		o.log.Warn("sent mail stays in the store for now", "mail", l.ID, "error", err)
	}
	o.mu.Lock()
	delete(o.waiting, l.ID)
	o.mu.Unlock()
}
