package control

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// Whoever reaches the socket gets an answer, in JSON where it is the agent's own, and
// the next one is served.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/v1/bind", []byte(`{"email":"a@b"}`))
	f.Add("POST", "/v1/generations/1/rollback", []byte{})
	f.Add("POST", "/v1/generations/-1/rollback", []byte{})
	f.Add("GET", "/v1/status", []byte("{}"))
	f.Add("POST", "/v1/damaged/00", []byte{})
	f.Add("POST", "/v1/doctor", []byte(`{`))
	path, _ := serve(f, &node{})
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		var raw bytes.Buffer
		fmt.Fprintf(&raw, "%s %s HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", method, target, len(body), body)
		if _, err := raw.WriteTo(c); err != nil {
			return // it has had enough
		}
		// What follows the request it may take for another one.
		_ = c.(*net.UnixConn).CloseWrite()
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return // it was no HTTP, and the connection is closed
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		if err == nil && resp.StatusCode == http.StatusOK && resp.Header.Get("Content-Type") == "application/json" && !json.Valid(answer) {
			t.Fatalf("%s %s: %s", method, target, answer)
		}
		if resp.StatusCode >= 500 && resp.StatusCode != http.StatusHTTPVersionNotSupported && resp.StatusCode != http.StatusNotImplemented {
			t.Fatalf("%s %s: %s %s", method, target, resp.Status, answer)
		}
	})
}
