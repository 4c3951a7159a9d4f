package plainhttp

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"testing"
)

type canned struct {
	net.Conn
	r io.Reader
}

func (c canned) Read(p []byte) (int, error) { return c.r.Read(p) }

// Whatever an engine answers ends, and its head is no larger than it may be.
func FuzzResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n"))
	f.Add([]byte("HTTP/1.0 200\r\n\r\nuntil the end"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		const most = 512
		c := &conn{Conn: canned{r: bytes.NewReader(raw)}, maxHead: most}
		c.r = bufio.NewReaderSize(c, 64)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://engine/v1/completions", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.response(req)
		if err != nil {
			if err == io.EOF {
				t.Fatal("an end without an answer is taken for one")
			}
			return
		}
		defer resp.Body.Close()
		size := 0
		for name, values := range resp.Header {
			for _, v := range values {
				size += len(name) + len(v)
			}
		}
		if size > most {
			t.Fatalf("a head of %d bytes", size)
		}
		if n, _ := io.Copy(io.Discard, resp.Body); n > int64(len(raw)) {
			t.Fatalf("%d bytes of %d", n, len(raw))
		}
	})
}
