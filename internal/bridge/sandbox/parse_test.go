package sandbox

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
)

func TestParseStatus(t *testing.T) {
	const text = "Name:\tbridge\nUid:\t1000\t1001\t1002\t1003\nGid:\t1\t2\t3\t4\nGroups:\t5 6 \n" +
		"CapInh:\t0000000000000000\nCapPrm:\t0000000000000001\nCapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000000\n" +
		"NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"
	s, err := parseStatus(text)
	if err != nil {
		t.Fatal(err)
	}
	if s.UID != [4]int{1000, 1001, 1002, 1003} || s.GID != [4]int{1, 2, 3, 4} || !slices.Equal(s.Groups, []int{5, 6}) || s.NoNewPrivs != "1" || s.Seccomp != "2" {
		t.Errorf("got %+v", s)
	}
	want := []string{`CapPrm "0000000000000001"`, `CapBnd "000001ffffffffff"`}
	if got := s.capabilities(); !slices.Equal(got, want) {
		t.Errorf("capabilities %q, want %q", got, want)
	}
	if got := (status{}).capabilities(); len(got) != len(capSets) {
		t.Errorf("sets that were not found count as empty: %q", got)
	}
	for _, bad := range []string{"Uid:\t1000\n", "Uid:\ta b c d\n", "Groups:\tx\n"} {
		if _, err := parseStatus(bad); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func TestParseMounts(t *testing.T) {
	const text = `184 194 254:0 /home/node/mod\040els /mod\040els ro,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
186 198 0:54 /rt/sock /run/resultity rw,nosuid - tmpfs tmpfs rw,size=2468408k
187 198 0:55 / /x rw - squashfs none ro
`
	got, err := parseMounts(text)
	if err != nil {
		t.Fatal(err)
	}
	want := []mount{{184, "/mod els", "ext4", true}, {186, "/run/resultity", "tmpfs", false}, {187, "/x", "squashfs", true}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{"\n", "1 2 3\n", "x 194 254:0 / / ro - ext4 /dev/vda rw\n", `1 194 254:0 / /\04 ro - ext4 /dev/vda rw` + "\n", `1 194 254:0 / /\999 ro - ext4 /dev/vda rw` + "\n", "1 194 254:0 / / ro ext4 /dev/vda rw\n"} {
		if m, err := parseMounts(bad); err == nil {
			t.Errorf("accepted %q as %+v", bad, m)
		}
	}
}

func TestParseIDMap(t *testing.T) {
	got, err := parseIDMap("         0       1000          1\n         1     100000      65536\n")
	want := []contract.IDRange{{Inside: 0, Outside: 1000, Size: 1}, {Inside: 1, Outside: 100000, Size: 65536}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v (%v), want %+v", got, err, want)
	}
	for id, want := range map[int]bool{0: true, 1: true, 1000: true, 65536: true, 65537: false, -1: false} {
		if got := subordinate(got, id); got != want {
			t.Errorf("id %d: subordinate is %v, want %v", id, got, want)
		}
	}
	// The whole range, as on a host without a user namespace.
	host, err := parseIDMap("0 0 4294967295\n")
	if err != nil || subordinate(host, 1000) {
		t.Errorf("the host's own map passes (%v)", err)
	}
	for _, bad := range []string{"0 0\n", "0 0 x\n", "0 0 4294967296\n", "-1 0 1\n"} {
		if _, err := parseIDMap(bad); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func TestParseRoutes(t *testing.T) {
	v4 := "Iface\tDestination\tGateway \tFlags\n" + "eth0\t00000000\t0102000A\t0003\n" + "lo\t0000007F\t00000000\t0001\n"
	if got, want := parseRoutes(v4), []string{"00000000 over eth0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	zero := strings.Repeat("0", 32)
	v6 := zero + " 00 " + zero + " 00 " + zero + " ffffffff 00000001 00000000 00200200       lo\n" +
		"fe80" + zero[4:] + " 40 " + zero + " 00 " + zero + " 00000100 00000001 00000000 00000001     eth0\n"
	if got, want := parseRoutes6(v6), []string{"fe80" + zero[4:] + " over eth0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestParseUnix(t *testing.T) {
	const text = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 19325 /run/dbus/system_bus_socket
0000000000000000: 00000002 00000000 00010000 0001 01 19326 @/tmp/.X11-unix/X0
0000000000000000: 00000003 00000000 00000000 0001 03 19327
0000000000000000: 00000002 00000000 00010000 0001 01 19328 @ with spaces
`
	if got, want := parseUnix(text), []string{"@/tmp/.X11-unix/X0", "@"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Dead tunnels that a kernel puts into each network namespace are no way out.
func TestForeign(t *testing.T) {
	lo := link{Name: "lo", Up: true, Loopback: true}
	for _, tt := range []struct {
		links []link
		want  []string
	}{
		{[]link{lo, {Name: "sit0"}, {Name: "tunl0"}}, nil},
		{[]link{lo, {Name: "sit0", Up: true}}, []string{"sit0"}},
		{[]link{lo, {Name: "eth0", Addresses: []string{"10.0.0.1/8"}}}, []string{"eth0"}},
		{[]link{{Name: "lo", Loopback: true}}, []string{"no loopback that is up"}},
		{nil, []string{"no loopback that is up"}},
	} {
		if got := foreign(tt.links); !slices.Equal(got, tt.want) {
			t.Errorf("foreign(%+v) = %q, want %q", tt.links, got, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("184 194 254:0 /a\\040b /c ro,relatime shared:1 - ext4 /dev/vda rw\n")
	f.Add("Uid:\t0\t0\t0\t0\n")
	f.Add("0 1000 1\n")
	f.Fuzz(func(t *testing.T, s string) {
		parseStatus(s)
		parseIDMap(s)
		parseMounts(s)
		parseRoutes(s)
		parseRoutes6(s)
		parseUnix(s)
	})
}

func TestSteady(t *testing.T) {
	for ids, want := range map[[4]int]bool{
		{1000, 1000, 1000, 1000}: true,
		{0, 0, 0, 0}:             false,
		{1000, 0, 1000, 1000}:    false,
		{1000, 1000, 0, 1000}:    false,
		{0, 1000, 1000, 1000}:    false,
		{1000, 1000, 1000, 0}:    false,
	} {
		if got := steady(ids); got != want {
			t.Errorf("steady(%v) = %v, want %v", ids, got, want)
		}
	}
}
