package main

// A DER writer that also writes what no library would: every certificate here is put together octet by octet.

import (
	"math/big"
	"strconv"
	"strings"
)

func el(tag byte, parts ...[]byte) []byte {
	content := cat(parts...)
	n := len(content)
	out := []byte{tag}
	switch {
	case n < 128:
		out = append(out, byte(n))
	case n < 256:
		out = append(out, 0x81, byte(n))
	case n < 65536:
		out = append(out, 0x82, byte(n>>8), byte(n))
	default:
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	return append(out, content...)
}

func cat(parts ...[]byte) []byte {
	var out []byte
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func seq(parts ...[]byte) []byte { return el(0x30, parts...) }
func set(parts ...[]byte) []byte { return el(0x31, parts...) }
func octets(b []byte) []byte     { return el(4, b) }
func bits(b []byte) []byte       { return el(3, append([]byte{0}, b...)) }
func boolean(v bool) []byte {
	if v {
		return []byte{1, 1, 0xff}
	}
	return []byte{1, 1, 0}
}
func null() []byte { return []byte{5, 0} }

func integer(n *big.Int) []byte {
	b := n.Bytes()
	if len(b) == 0 || b[0]&0x80 != 0 {
		b = append([]byte{0}, b...)
	}
	return el(2, b)
}

func num(n int64) []byte {
	if n >= 0 {
		return integer(big.NewInt(n))
	}
	return []byte{2, 1, byte(n)}
}

func oid(text string) []byte { return el(6, oidContent(text)) }

func oidContent(text string) []byte {
	var v []int
	for _, p := range strings.Split(text, ".") {
		n, err := strconv.Atoi(p)
		if err != nil {
			panic(err)
		}
		v = append(v, n)
	}
	out := base128(v[0]*40 + v[1])
	for _, n := range v[2:] {
		out = append(out, base128(n)...)
	}
	return out
}

func base128(n int) []byte {
	out := []byte{byte(n & 0x7f)}
	for n >>= 7; n > 0; n >>= 7 {
		out = append([]byte{byte(n&0x7f) | 0x80}, out...)
	}
	return out
}

const (
	utf8String = 12
	numeric    = 18
	printable  = 19
	t61        = 20
	ia5        = 22
	universal  = 28
	bmp        = 30
)

func attr(kind string, tag byte, value []byte) []byte {
	return set(seq(oid(kind), el(tag, value)))
}

const (
	cn  = "2.5.4.3"
	org = "2.5.4.10"
	uid = "1.3.6.1.4.1.57683.2"
)

func name(common string, orgs ...string) []byte {
	var parts [][]byte
	for _, o := range orgs {
		parts = append(parts, attr(org, utf8String, []byte(o)))
	}
	return seq(append(parts, attr(cn, utf8String, []byte(common)))...)
}

func utc(text string) []byte         { return el(23, []byte(text)) }
func generalized(text string) []byte { return el(24, []byte(text)) }
