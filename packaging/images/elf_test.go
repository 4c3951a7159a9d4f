package images

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// makeELF returns an ELF file that names the given loader, libraries and
// library path, each left out where empty, and holds no code.
func makeELF(t *testing.T, interp, runpath string, needed ...string) []byte {
	t.Helper()
	var dynstr bytes.Buffer
	str := func(b *bytes.Buffer, s string) uint64 {
		if b.Len() == 0 {
			b.WriteByte(0)
		}
		at := b.Len()
		b.WriteString(s + "\x00")
		return uint64(at)
	}
	var dyn []elf.Dyn64
	for _, lib := range needed {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: str(&dynstr, lib)})
	}
	if runpath != "" {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_RUNPATH), Val: str(&dynstr, runpath)})
	}
	dyn = append(dyn, elf.Dyn64{})
	str(&dynstr, "")
	var names bytes.Buffer
	nameStr, nameDyn, nameNames := str(&names, ".dynstr"), str(&names, ".dynamic"), str(&names, ".shstrtab")

	const head, prog, sect = 64, 56, 64
	data := uint64(head + prog)
	sections := []struct {
		h elf.Section64
		b []byte
	}{
		{},
		{elf.Section64{Name: uint32(nameStr), Type: uint32(elf.SHT_STRTAB)}, dynstr.Bytes()},
		{elf.Section64{Name: uint32(nameDyn), Type: uint32(elf.SHT_DYNAMIC), Link: 1, Entsize: 16}, encode(t, dyn)},
		{elf.Section64{Name: uint32(nameNames), Type: uint32(elf.SHT_STRTAB)}, names.Bytes()},
	}
	end := data + uint64(len(interp)+1)
	for i := range sections[1:] {
		s := &sections[i+1]
		s.h.Off, s.h.Size = end, uint64(len(s.b))
		end += s.h.Size
	}
	h := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1,
		Ehsize: head, Phoff: head, Phentsize: prog, Phnum: 1,
		Shoff: end, Shentsize: sect, Shnum: uint16(len(sections)), Shstrndx: 3,
	}
	copy(h.Ident[:], elfMagic)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	p := elf.Prog64{Type: uint32(elf.PT_NULL)}
	if interp != "" {
		p = elf.Prog64{Type: uint32(elf.PT_INTERP), Off: data, Filesz: uint64(len(interp) + 1)}
	}
	out := slices.Concat(encode(t, h), encode(t, p), []byte(interp+"\x00"))
	for _, s := range sections {
		out = append(out, s.b...)
	}
	for _, s := range sections {
		out = append(out, encode(t, s.h)...)
	}
	return out
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestParseELF(t *testing.T) {
	o, err := parseELF(makeELF(t, "/lib64/ld.so", "/opt/x:$ORIGIN/y:relative", "libb.so.1", "liba.so"), "/usr/bin")
	if err != nil {
		t.Fatal(err)
	}
	if o.interp != "/lib64/ld.so" {
		t.Errorf("loader %q, want /lib64/ld.so", o.interp)
	}
	if want := []string{"libb.so.1", "liba.so"}; !slices.Equal(o.needed, want) {
		t.Errorf("needed %q, want %q", o.needed, want)
	}
	if want := []string{"/opt/x", "/usr/bin/y"}; !slices.Equal(o.dirs, want) {
		t.Errorf("directories %q, want %q: a relative one must not count", o.dirs, want)
	}

	// Cut or garbled files give an error, whatever byte it is, never a panic.
	whole := makeELF(t, "/lib64/ld.so", "", "liba.so")
	for i := range whole {
		parseELF(whole[:i], "/")
		bad := bytes.Clone(whole)
		bad[i] ^= 0xff
		parseELF(bad, "/")
	}
	if _, err := parseELF(whole[:40], "/"); err == nil {
		t.Error("a file cut in its header gave no error")
	}
}

func TestLibraryPath(t *testing.T) {
	lib := func() *entry { return &entry{mode: 0o644, data: makeELF(t, "", "")} }
	dir := func() *entry { return &entry{mode: dirMode} }
	tr := tree{
		"/opt": dir(), "/opt/liba.so": lib(),
		"/usr": dir(), "/usr/lib": dir(), "/usr/lib/x86_64-linux-gnu": dir(),
		"/usr/lib/x86_64-linux-gnu/liba.so": lib(), "/usr/lib/x86_64-linux-gnu/libb.so": lib(),
		"/usr/bin": dir(), "/usr/bin/prog": {mode: 0o755, data: makeELF(t, "", "/opt", "liba.so", "libb.so")},
	}
	_, libs, err := tr.requires("/usr/bin/prog")
	if want := []string{"/opt/liba.so", "/usr/lib/x86_64-linux-gnu/libb.so"}; err != nil || !slices.Equal(libs, want) {
		t.Errorf("libraries %q, error %v, want %q", libs, err, want)
	}
	delete(tr, "/usr/lib/x86_64-linux-gnu/libb.so")
	if _, _, err := tr.requires("/usr/bin/prog"); err == nil || !strings.Contains(err.Error(), "libb.so") {
		t.Errorf("error %v, want one that names libb.so", err)
	}
}
