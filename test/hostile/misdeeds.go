package hostile

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// Misdeed is a way to answer that is none.
type Misdeed struct {
	Name string
	// Want are the codes that the job may fail with; "" stands for an answer,
	// which is the right one.
	Want []string
	// Ends says that the engine is ended for it.
	Ends bool

	do func(c net.Conn, good string) // good is the stream that it should be
}

// Prompt is what has an armed engine do it. Any other answers as to each prompt.
func (m Misdeed) Prompt() string { return askMisdeed + m.Name }

const (
	ok     = "HTTP/1.1 200 OK\r\n"
	stream = "Content-Type: text/event-stream\r\n"
	head   = ok + stream + "Connection: close\r\n\r\n"

	chunked = ok + stream + "Transfer-Encoding: chunked\r\n\r\n"
)

// event is one of a chat's stream.
func event(choices, more string) string {
	return fmt.Sprintf("data: {\"object\":\"chat.completion.chunk\",\"choices\":[%s]%s}\n\n", choices, more)
}

func text(s string) string {
	return event(`{"index":0,"delta":{"content":"`+s+`"},"finish_reason":null}`, "")
}

const stop = `{"index":0,"delta":{},"finish_reason":"stop"}`

func usage(prompt, completion string) string {
	return event("", fmt.Sprintf(`,"usage":{"prompt_tokens":%s,"completion_tokens":%s,"total_tokens":1}`, prompt, completion))
}

const done = "data: [DONE]\n\n"

// flood is how much of something without end there is at most, in bytes.
const flood = 64 << 20

// endless says a piece again and again, after a beginning.
func endless(begin, piece string) func(net.Conn, string) {
	return func(c net.Conn, _ string) {
		if _, err := io.WriteString(c, begin); err != nil {
			return
		}
		many := strings.Repeat(piece, max(1, (64<<10)/len(piece)))
		for range flood / len(many) {
			if _, err := io.WriteString(c, many); err != nil {
				return
			}
		}
	}
}

// slowly says something at once, then more at a few bytes a second, and then a
// piece again and again as slowly, for as long as somebody listens.
func slowly(first, begin, piece string) func(net.Conn, string) {
	return func(c net.Conn, good string) {
		if _, err := io.WriteString(c, strings.ReplaceAll(first, "GOOD", good)); err != nil {
			return
		}
		for end := time.Now().Add(time.Minute); time.Now().Before(end); begin = piece {
			for i := range len(begin) {
				if _, err := io.WriteString(c, begin[i:i+1]); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond) // this is what it is for
			}
		}
	}
}

// says is an answer as it is; GOOD in it stands for the right stream.
func says(answer string) func(net.Conn, string) {
	return func(c net.Conn, good string) {
		_, _ = io.WriteString(c, strings.ReplaceAll(answer, "GOOD", good)) // whoever asked may be gone
	}
}

var (
	engineFails = []string{"engine_failed"}
	badOutput   = []string{"engine_output"}
	noHarm      = []string{""}
)

// Misdeeds are all of them.
var Misdeeds = []Misdeed{
	// Too much, or too slowly.
	{Name: "a line without end", Want: badOutput, do: endless(head+"data: ", "x")},
	{Name: "an event without end", Want: badOutput, do: endless(head, "data: x\n")},
	{Name: "an answer without end", Want: badOutput, do: endless(head, text("word "))},
	{Name: "empty texts without end", Want: append([]string{"deadline", "cancelled"}, badOutput...), do: slowly(head, "", text(""))},
	{Name: "a status line without end", Want: engineFails, do: endless("HTTP/1.1 200 ", "x")},
	{Name: "a header without end", Want: engineFails, do: endless(ok+"X: ", "x")},
	{Name: "headers without end", Want: engineFails, do: endless(ok, "X: x\r\n")},
	{Name: "a head a byte at a time", Want: engineFails, Ends: true, do: slowly("", ok, "X: x\r\n")},
	{Name: "a body a byte at a time", Want: []string{"deadline", "cancelled"}, do: slowly(head, "", "data: {")},
	{Name: "comments a byte at a time", Want: engineFails, Ends: true, do: slowly(head, "", ": x\n\n")},
	{Name: "comments after the end", Want: noHarm, do: slowly(head+"GOOD", "", ": x\n\n")},
	{Name: "other lines after the end", Want: noHarm, do: slowly(head+"GOOD", "", "x: y\n")},
	{Name: "a bomb, compressed", Want: badOutput, do: func(c net.Conn, _ string) {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, _ = z.Write(make([]byte, 1<<20)) // to memory
		_ = z.Close()
		all := bytes.Repeat(b.Bytes(), 256) // one member behind the other is one file, too
		fmt.Fprintf(c, "%s%sContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", ok, stream, len(all), all)
	}},

	// Heads.
	{Name: "another type of content", Want: badOutput, do: says(ok + "Content-Type: application/json\r\nConnection: close\r\n\r\nGOOD")},
	{Name: "headers of its own", Want: noHarm, do: says(ok + stream + "Set-Cookie: hostile=1\r\nLocation: https://hostile.example/\r\nX-Hostile: 1\r\nAccess-Control-Allow-Origin: *\r\nConnection: close\r\n\r\nGOOD")},
	{Name: "a type of content with more in it", Want: append([]string{"", "engine_failed"}, badOutput...), do: says(ok + "Content-Type: text/event-stream; x=\"\r X-Hostile: 1\"\r\nConnection: close\r\n\r\nGOOD")},
	{Name: "a folded header", Want: []string{"", "engine_failed"}, do: says(ok + "X: a\r\n b\r\n" + stream + "Connection: close\r\n\r\nGOOD")},
	{Name: "a zero byte in a header", Want: engineFails, do: says(ok + "X: a\x00b\r\n" + stream + "Connection: close\r\n\r\nGOOD")},
	{Name: "two lengths", Want: engineFails, do: says(ok + stream + "Content-Length: 5\r\nContent-Length: 7\r\n\r\nGOOD")},
	{Name: "a length below zero", Want: engineFails, do: says(ok + stream + "Content-Length: -1\r\n\r\nGOOD")},
	{Name: "a length and chunks", Want: append([]string{"engine_failed"}, badOutput...), do: says(ok + stream + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nGOOD")},
	{Name: "an unknown coding", Want: engineFails, do: says(ok + stream + "Transfer-Encoding: chunked, hostile\r\n\r\nGOOD")},
	{Name: "an answer behind the answer", Want: noHarm, do: func(c net.Conn, good string) {
		var both strings.Builder // in one piece: what comes later is an answer to the next request, and no worse than any other bad one
		for range 2 {
			fmt.Fprintf(&both, "%s%sContent-Length: %d\r\n\r\n%s", ok, stream, len(good), good)
			good = strings.ReplaceAll(good, "0", "forged")
		}
		_, _ = io.WriteString(c, both.String())
		time.Sleep(100 * time.Millisecond) // so that it could be taken for that of the next request
	}},
	{Name: "an upgrade", Want: engineFails, do: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nGOOD")},
	{Name: "hints without end", Want: engineFails, do: endless("", "HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")},
	{Name: "go on, without end", Want: engineFails, do: endless("", "HTTP/1.1 100 Continue\r\n\r\n")},
	{Name: "a redirection to somebody else", Want: engineFails, do: says("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n")},
	{Name: "a status that there is not", Want: engineFails, do: says("HTTP/1.1 999 Hostile\r\nContent-Length: 0\r\n\r\n")},
	{Name: "a status of no number", Want: engineFails, do: says("HTTP/1.1 2x0 OK\r\n\r\n")},
	{Name: "busy for ever", Want: engineFails, do: says("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 999999999999999999999\r\nContent-Length: 0\r\n\r\n")},
	{Name: "every request is bad", Want: []string{"bad_request"}, do: says("HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")},
	{Name: "every prompt is too long", Want: []string{"context_length"}, do: says("HTTP/1.1 400 Bad Request\r\nContent-Length: 87\r\n\r\n{\"error\":{\"type\":\"exceed_context_size_error\",\"n_prompt_tokens\":999999999999,\"n_ctx\":1}}")},
	{Name: "an error without end", Want: []string{"bad_request"}, do: endless("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "x")},
	{Name: "another protocol", Want: engineFails, do: says("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")},
	{Name: "no head", Want: engineFails, do: says("GOOD")},

	// Chunks.
	{Name: "a chunk that is longer than it says", Want: engineFails, do: says(chunked + "5\r\nGOOD\r\n0\r\n\r\n")},
	{Name: "a chunk that is shorter than it says", Want: engineFails, do: says(chunked + "ffff\r\nGOOD")},
	{Name: "a chunk of more bytes than there are numbers", Want: engineFails, do: says(chunked + "ffffffffffffffffff\r\nGOOD")},
	{Name: "a chunk of a negative size", Want: engineFails, do: says(chunked + "-5\r\nGOOD")},
	{Name: "extensions of chunks without end", Want: engineFails, do: endless(chunked, "1;"+strings.Repeat("x", 1000)+"\r\n:\r\n")},
	{Name: "trailers without end", Want: engineFails, do: endless(chunked+"0\r\n", "X: x\r\n")},

	// Ends.
	{Name: "nothing at all", Want: engineFails, do: says("")},
	{Name: "a head and nothing more", Want: append([]string{"engine_failed"}, badOutput...), do: says(head)},
	{Name: "half of an event", Want: append([]string{"engine_failed"}, badOutput...), do: says(head + "data: {\"object\":\"chat.comp")},
	{Name: "half of what it says", Want: engineFails, do: says(ok + stream + "Content-Length: 100000\r\n\r\n" + text("word"))},
	{Name: "a connection that is reset", Want: engineFails, do: func(c net.Conn, _ string) {
		_, _ = io.WriteString(c, head+text("word")) // whoever asked may be gone
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // closing it says so
		}
	}},

	// Events.
	{Name: "events after the end", Want: badOutput, do: endless(head+text("a")+event(stop, "")+usage("1", "1")+done, text("more"))},
	{Name: "the end at once", Want: badOutput, do: says(head + done)},
	{Name: "no end", Want: badOutput, do: says(head + text("a") + event(stop, "") + usage("1", "1"))},
	{Name: "text after its end", Want: badOutput, do: says(head + event(stop, "") + text("more") + usage("1", "1") + done)},
	{Name: "two choices", Want: badOutput, do: says(head + event(stop+","+stop, "") + done)},
	{Name: "another choice", Want: badOutput, do: says(head + event(`{"index":1,"delta":{"content":"x"},"finish_reason":null}`, "") + done)},
	{Name: "another object", Want: badOutput, do: says(head + "data: {\"object\":\"error\",\"choices\":[]}\n\n" + done)},
	{Name: "no JSON", Want: badOutput, do: says(head + "data: <html>\n\n" + done)},
	{Name: "JSON in too many levels", Want: badOutput, do: says(head + "data: " + strings.Repeat("[", 1<<19) + "\n\n" + done)},
	{Name: "bytes that are no text", Want: badOutput, do: says(head + text("\xff\xfe\xc0\x80") + done)},
	{Name: "half of a surrogate pair", Want: badOutput, do: says(head + text(`\ud800`) + event(stop, "") + usage("1", "1") + done)},
	{Name: "more tokens than were asked for", Want: badOutput, do: says(head + text("a") + event(stop, "") + usage("1", "100000") + done)},
	{Name: "less than no tokens", Want: badOutput, do: says(head + text("a") + event(stop, "") + usage("1", "-1") + done)},
	{Name: "more tokens than numbers", Want: badOutput, do: says(head + text("a") + event(stop, "") + usage("18446744073709551616", "1e300") + done)},
	{Name: "more tokens of the prompt than the context has", Want: badOutput, do: says(head + text("a") + event(stop, "") + usage("1000000", "1") + done)},
	{Name: "an error in the middle", Want: engineFails, do: says(head + text("a") + "data: {\"error\":{\"message\":\"<script>\",\"code\":200}}\n\n" + done)},
}
