package runtime

import (
	"bytes"

	"github.com/resultity/node/internal/openai"
)

// maxEvent bounds a line of the engine's stream, and the data of one event.
const maxEvent = 1 << 20

// parser splits an event stream (text/event-stream of the HTML standard) into
// the data of its events. Names, ids and comments of events mean nothing here.
// An event that the stream's end cuts off is dropped, as the standard says.
type parser struct {
	line    []byte // of which the end has not come yet
	data    []byte // of the event that is being read, a line feed after each line
	hasData bool
	skipLF  bool // the last line ended with CR
	begun   bool
}

// feed takes the next bytes, cut anywhere, and calls event for each event that
// they complete. The data is valid until event returns.
func (p *parser) feed(b []byte, event func(data []byte) error) error {
	for len(b) > 0 {
		if p.skipLF {
			p.skipLF = false
			if b[0] == '\n' {
				b = b[1:]
				continue
			}
		}
		i := bytes.IndexAny(b, "\r\n")
		if i < 0 {
			i = len(b)
		}
		if len(p.line)+i > maxEvent {
			return &openai.OutputError{Reason: openai.ReasonNoStream, Detail: "a line is longer than 1 MiB"}
		}
		line := b[:i]
		if i == len(b) {
			p.line = append(p.line, line...)
			return nil
		}
		p.skipLF = b[i] == '\r'
		b = b[i+1:]
		if len(p.line) > 0 {
			p.line = append(p.line, line...)
			line = p.line
		}
		if err := p.endLine(line, event); err != nil {
			return err
		}
		p.line = p.line[:0]
	}
	return nil
}

func (p *parser) endLine(line []byte, event func(data []byte) error) error {
	if !p.begun {
		p.begun = true
		line = bytes.TrimPrefix(line, []byte("\ufeff"))
	}
	if len(line) == 0 {
		if !p.hasData {
			return nil
		}
		data := p.data[:len(p.data)-1]
		p.data, p.hasData = p.data[:0], false
		return event(data)
	}
	field, value, _ := bytes.Cut(line, []byte(":"))
	if string(field) != "data" {
		return nil
	}
	value = bytes.TrimPrefix(value, []byte(" "))
	if len(p.data)+len(value) > maxEvent {
		return &openai.OutputError{Reason: openai.ReasonNoStream, Detail: "an event is longer than 1 MiB"}
	}
	p.data = append(append(p.data, value...), '\n')
	p.hasData = true
	return nil
}
