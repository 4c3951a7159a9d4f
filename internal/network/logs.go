package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/wire"
)

// LogLine is one record of a node's log. One with a number of dropped records has
// nothing else but the node, the position of the last of them and the time at
// which the network heard of it.
type LogLine struct {
	Node evm.Address `json:"node"`
	wire.LogRecord
	Dropped uint64 `json:"dropped,omitempty"`
	// Error ends what the service sends when it could not go on.
	Error string `json:"error,omitempty"`
}

// LogQuery chooses records.
type LogQuery struct {
	Node  *evm.Address // nil for all
	Job   string       // "" for all
	Since time.Time
}

// readLogs passes what is chosen to f, batch by batch as it came.
func readLogs(ctx context.Context, s *store.Store, q LogQuery, f func(LogLine) error) error {
	return s.ReadLogs(ctx, q.Node, q.Since, func(l *store.Logs, b *wire.LogBatch) error {
		records, err := b.Unpack(l.Logs.Data)
		if err != nil {
			return err
		}
		if n := b.Dropped(); n > 0 && q.Job == "" {
			if err := f(LogLine{Node: b.Node, Dropped: n, LogRecord: wire.LogRecord{Position: b.Last, Time: l.Received.UnixMilli()}}); err != nil {
				return err
			}
		}
		for _, r := range records {
			if q.Job != "" && r.Fields["job"] != q.Job || r.Time < q.Since.UnixMilli() && !q.Since.IsZero() {
				continue
			}
			if err := f(LogLine{Node: b.Node, LogRecord: r}); err != nil {
				return err
			}
		}
		return nil
	})
}

// serveLogs streams a line of JSON for each record.
func (s *service) serveLogs(w http.ResponseWriter, r *http.Request) {
	var q LogQuery
	v := r.URL.Query()
	if n := v.Get("node"); n != "" {
		a, err := evm.ParseAddress(n)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		q.Node = &a
	}
	q.Job = v.Get("job")
	if t := v.Get("since"); t != "" {
		var err error
		if q.Since, err = time.Parse(time.RFC3339Nano, t); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	e := json.NewEncoder(w)
	if err := readLogs(r.Context(), s.store, q, func(l LogLine) error { return e.Encode(l) }); err != nil {
		_ = e.Encode(LogLine{Error: err.Error()}) // who has gone needs no answer
	}
}

// Logs passes the records that are chosen to f.
func (c *adminClient) Logs(ctx context.Context, q LogQuery, f func(LogLine) error) error {
	v := url.Values{"job": {q.Job}}
	if q.Node != nil {
		v.Set("node", q.Node.Hex())
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.Format(time.RFC3339Nano))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin/logs?"+v.Encode(), nil)
	if err != nil {
		return err
	}
	patient := c.http
	patient.Timeout = 0 // as long as lines come
	res, err := patient.Do(req)
	if err != nil {
		return turnedAway(err)
	}
	defer res.Body.Close() // what was read counts
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10)) // the status says it, too
		return fmt.Errorf("admin socket: %s: %s", res.Status, text)
	}
	for d := json.NewDecoder(res.Body); ; {
		var l LogLine
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("admin socket: %w", err)
		}
		if l.Error != "" {
			return errors.New(l.Error)
		}
		if err := f(l); err != nil {
			return err
		}
	}
}

func (a storeAdmin) Logs(ctx context.Context, q LogQuery, f func(LogLine) error) error {
	return readLogs(ctx, a.store, q, f)
}
