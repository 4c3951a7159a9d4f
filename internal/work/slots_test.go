package work

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// Two workers never have more slots at once than there are; one that has had a
// job lately finds one, and one that has not keeps none from the other.
func TestSlotsAreShared(t *testing.T) {
	now := time.Unix(1_000_000_000, 0)
	s, a, b := NewSlots(), new(Worker), new(Worker)
	s.serve(a, true)
	s.serve(b, true)
	take := func(w *Worker, want bool) {
		t.Helper()
		if free := s.free(w, 2, now); (free > 0) != want {
			t.Errorf("%d are free", free)
		}
		if got := s.take(w, 2, now); got != want {
			t.Fatalf("take: %v, want %v", got, want)
		}
	}
	take(a, true)
	take(a, true)
	take(a, false)
	take(b, false)
	s.give(a, now)
	take(b, true)
	s.give(b, now)
	take(a, false) // kept for b, which has had a job lately
	take(b, true)
	s.give(b, now)
	now = now.Add(keepFor)
	take(a, true) // b has shown nothing for a minute
	s.give(a, now)
	s.give(a, now)
	take(b, true)
	s.give(b, now)
	s.serve(b, false)
	take(a, true)
	take(a, true) // who serves no more keeps nothing
}

// With fewer slots than networks nothing is kept: else nobody got any.
func TestOneSlotForTwo(t *testing.T) {
	now := time.Unix(1_000_000_000, 0)
	s, a, b := NewSlots(), new(Worker), new(Worker)
	for _, w := range []*Worker{a, b, a} {
		s.serve(w, true)
		if !s.take(w, 1, now) || s.take(a, 1, now) || s.take(b, 1, now) {
			t.Fatal("one slot, and not one job")
		}
		s.give(w, now)
	}
}

// Who holds a slot for the machine gets the next that is free, before any job.
func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a := NewSlots(), new(Worker)
		if !s.take(a, 1, time.Now()) {
			t.Fatal("no slot")
		}
		got := make(chan func())
		go func() {
			release, err := s.Hold(t.Context(), 1)
			if err != nil {
				t.Error(err)
			}
			got <- release
		}()
		synctest.Wait()
		s.give(a, time.Now())
		if s.take(a, 1, time.Now()) {
			t.Error("a job was before it")
		}
		release := <-got
		if s.take(a, 1, time.Now()) {
			t.Error("it is taken twice")
		}
		release()
		if !s.take(a, 1, time.Now()) {
			t.Error("it was not given back")
		}
	})
}

// A slot that is given back as the one who waits for it gives up is not forgotten by
// whoever waits behind him.
func TestHoldGivesUp(t *testing.T) {
	for range 200 { // of two that wake at once either may come first
		synctest.Test(t, func(t *testing.T) {
			s, a := NewSlots(), new(Worker)
			if !s.take(a, 1, time.Now()) {
				t.Fatal("no slot")
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				if _, err := s.Hold(ctx, 1); err == nil {
					t.Error("it has given up, and has a slot")
				}
			}()
			synctest.Wait()
			lent := false
			go func() {
				if _, err := s.Borrow(t.Context(), 1, func() {}); err == nil {
					lent = true
				}
			}()
			synctest.Wait()
			s.mu.Lock()
			cancel()
			s.users[a].busy-- // as give
			s.changedLocked()
			s.mu.Unlock()
			synctest.Wait()
			if !lent {
				t.Fatal("a slot is free, and nobody is told")
			}
		})
	}
}

// Of two slots that are given back at once, one is Hold's, and the other is lent.
func TestHoldLeavesOne(t *testing.T) {
	for range 200 { // of two that wake at once either may come first
		synctest.Test(t, func(t *testing.T) {
			s, a := NewSlots(), new(Worker)
			for range 2 {
				if !s.take(a, 2, time.Now()) {
					t.Fatal("no slot")
				}
			}
			held, lent := false, false
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				_, err := s.Borrow(ctx, 2, func() {})
				lent = err == nil
			}()
			synctest.Wait()
			go func() {
				_, err := s.Hold(t.Context(), 2)
				held = err == nil
			}()
			synctest.Wait()
			s.mu.Lock()
			s.users[a].busy -= 2 // as give, twice
			s.changedLocked()
			s.mu.Unlock()
			synctest.Wait()
			if !held || !lent {
				t.Fatalf("two slots are free: held %v, lent %v", held, lent)
			}
		})
	}
}

// Company is whoever else has had a slot meanwhile, jobs or not.
func TestAlone(t *testing.T) {
	s := NewSlots()
	w := New(Config{Slots: s})
	now := time.Now()
	if still := s.Alone(0); !still() {
		t.Error("not alone with nobody")
	}
	release, err := s.Hold(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	if s.Alone(0)() {
		t.Error("alone beside one who holds a slot")
	}
	still := s.Alone(1)
	if !still() {
		t.Error("not alone with oneself")
	}
	if !s.take(w, 2, now) {
		t.Fatal("no slot")
	}
	if still() || s.Alone(1)() {
		t.Error("alone beside a job")
	}
	s.give(w, now)
	if still() {
		t.Error("alone beside a job that has come and gone")
	}
	if !s.Alone(1)() {
		t.Error("not alone after it")
	}
	still = s.Alone(1)
	back, err := s.Borrow(t.Context(), 2, func() {})
	if err != nil {
		t.Fatal(err)
	}
	if !s.take(w, 2, now) { // which recalls it; its user has not ended yet
		t.Fatal("no slot")
	}
	s.give(w, now)
	if still() || s.Alone(1)() {
		t.Error("alone beside a recalled loan")
	}
	back()
	if !s.Alone(1)() {
		t.Error("not alone after it was given back")
	}
	release()
}

// Who wants the engine for itself waits until nobody has it, holds up nobody before,
// and has it alone then.
func TestHoldAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a, b := NewSlots(), new(Worker), new(Worker)
		if !s.take(a, 2, time.Now()) {
			t.Fatal("no slot")
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.HoldAll(short, 2); err == nil {
			t.Fatal("had beside a job")
		}
		recalled := make(chan struct{})
		got := make(chan func(), 1)
		go func() {
			release, err := s.HoldAll(t.Context(), 2)
			if err != nil {
				t.Error(err)
			}
			got <- release
		}()
		synctest.Wait()
		if !s.take(b, 2, time.Now()) {
			t.Error("a job waits for who waits for all")
		}
		s.give(a, time.Now())
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("had beside a job")
		}
		back, err := s.Borrow(t.Context(), 2, func() { close(recalled) })
		if err != nil {
			t.Fatal(err)
		}
		s.give(b, time.Now())
		<-recalled
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("had beside what a loan still does")
		}
		back()
		release := <-got
		still := s.Alone(2)
		if s.take(a, 2, time.Now()) || s.free(b, 2, time.Now()) != 0 {
			t.Error("a job beside it")
		}
		if !still() {
			t.Error("not alone")
		}
		release()
		if !s.take(a, 2, time.Now()) || s.held != 0 {
			t.Errorf("%d are held still", s.held)
		}
		// One that gives up in between keeps none.
		s.give(a, time.Now())
		if back, err = s.Borrow(t.Context(), 2, func() {}); err != nil {
			t.Fatal(err)
		}
		short, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.HoldAll(short, 2); err == nil || s.held != 0 {
			t.Errorf("%v, %d are held", err, s.held)
		}
		back()
	})
}
