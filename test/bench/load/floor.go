package load

import (
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/resultity/node/internal/evm"
)

// What lies one behind the other on the way of a plain job, with nothing left
// out and nothing added: the node writes the result down, with one sync, and
// signs the receipt; the network checks it. That both write the job down is
// beside the way, and so is all that follows the answer.
const (
	Syncs  = 1
	Signs  = 1
	Checks = 1
)

// floor does that much and nothing else. It is not safe for concurrent use.
type floor struct {
	file *os.File
	page []byte
	key  *evm.Key
}

func newFloor() (*floor, error) {
	file, err := os.CreateTemp("/var/tmp", "floor-") // on the disk of the node's state
	if err != nil {
		return nil, err
	}
	f := &floor{file: file, page: make([]byte, 4096)}
	if err = os.Remove(file.Name()); err == nil {
		f.key, err = evm.NewKey()
	}
	if err == nil {
		_, err = f.once() // the file gets its size
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return f, nil
}

func (f *floor) close() { _ = f.file.Close() } // nothing in it is wanted

func (f *floor) once() (answer, error) {
	begin := time.Now()
	for range Syncs {
		if _, err := f.file.WriteAt(f.page, 0); err != nil {
			return answer{}, err
		}
		if err := syscall.Fdatasync(int(f.file.Fd())); err != nil {
			return answer{}, err
		}
	}
	hash := evm.Keccak(f.page)
	var sig evm.Signature
	for range Signs {
		var err error
		if sig, err = f.key.Sign(hash); err != nil {
			return answer{}, err
		}
	}
	for range Checks {
		if _, err := evm.Recover(hash, sig); err != nil {
			return answer{}, err
		}
	}
	return answer{total: micros(time.Since(begin))}, nil
}
