package state

import "encoding/binary"

// This file finds out which one byte of a frame was changed. A checksum of 32 bits
// says so: what a changed byte adds to it depends on nothing but the byte and how
// many bytes follow. It is believed where the frame then has its number and all
// records of it, which have checksums of their own where they are long, are right.

// topOf finds an entry of the table by its highest byte, of which no two have the
// same.
var topOf = func() (of [256]byte) {
	for i, x := range castagnoli {
		of[x>>24] = byte(i)
	}
	return of
}()

// changed returns the places in n bytes, and the changes there, of which each alone
// gives the difference between two checksums.
func changed(diff uint32, n int) (at []int, by []byte) {
	for i := n - 1; i >= 0; i-- {
		k := topOf[diff>>24]
		if diff == castagnoli[k] {
			at, by = append(at, i), append(by, k)
		}
		diff = (diff^castagnoli[k])<<8 | uint32(k)
	}
	return at, by
}

// mendFrame makes the frame of a number whole of what b begins with, if one byte of
// it was changed, or its number. It returns the length of the frame, 0 if there is none.
func mendFrame(b []byte, salt, want uint64) int {
	if len(b) < frameHead {
		return 0
	}
	try := func(at int, by byte) (n int) {
		b[at] ^= by
		payload, is, ok := readFrame(b, salt)
		if ok && is == want && wellMade(payload) {
			return frameHead + len(payload)
		}
		b[at] ^= by
		return 0
	}
	if was := frameNumber(b, salt); was != want {
		putFrameNumber(b, salt, want)
		if n := try(0, 0); n > 0 {
			return n
		}
		putFrameNumber(b, salt, was)
		return 0
	}
	if n := int64(binary.BigEndian.Uint32(b[4:])); n <= int64(len(b)-frameHead) {
		diff := frameSum(salt, b[4:frameHead+n]) ^ binary.BigEndian.Uint32(b)
		if diff == 0 {
			return 0 // what is in it was never right
		}
		for shift := range 4 { // the checksum itself?
			if diff&^(0xff<<(8*shift)) == 0 {
				if n := try(3-shift, byte(diff>>(8*shift))); n > 0 {
					return n
				}
			}
		}
		at, by := changed(diff, frameHead-4+int(n))
		for _, bit := range []bool{true, false} { // one bit is what happens most
			for i, by := range by {
				if (by&(by-1) == 0) != bit {
					continue
				}
				if n := try(4+at[i], by); n > 0 {
					return n
				}
			}
		}
	}
	for at := 4; at < 8; at++ { // its length?
		for by := 1; by < 256; by++ {
			if n := try(at, byte(by)); n > 0 {
				return n
			}
		}
	}
	return 0
}

// wellMade reports whether the payload of a frame holds records, and their texts are
// as they were made.
func wellMade(payload []byte) bool {
	return eachRecord(payload, func(k kind, _ int, body []byte) error {
		if n := textAt(k); n > 0 && !sound(body[n:]) {
			return ErrCorrupt
		}
		return nil
	}) == nil
}

// textAt is where the text of a record of a kind begins, 0 if it has none.
func textAt(k kind) int {
	switch k {
	case kindJob:
		return jobPrefix
	case kindResult:
		return resultPrefix
	}
	return 0
}
