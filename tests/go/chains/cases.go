package main

import (
	"crypto/elliptic"
	"fmt"
	"slices"
	"strings"
)

type ext struct {
	oid      string
	critical bool
	value    []byte
}

// cert is a certificate before it is signed; whatever is set in raw replaces the field of that name.
type cert struct {
	version  int
	serial   []byte
	alg      string
	inner    string // another algorithm in the part that is signed
	issuer   []byte
	before   []byte
	after    []byte
	subject  []byte
	spki     []byte
	exts     []ext
	unique   []byte // unique identifiers, as they are
	behind   []byte // after the whole certificate
	mutate   func([]byte) []byte
	breakSig bool
}

type node struct {
	c   cert
	k   *key
	der []byte
}

type testCase struct {
	name         string
	roots, chain []node
}

var cases []testCase

func add(name string, roots, chain []node) { cases = append(cases, testCase{name, roots, chain}) }

func (c *cert) set(id string, critical bool, value []byte) {
	for i := range c.exts {
		if c.exts[i].oid == id {
			c.exts[i] = ext{id, critical, value}
			return
		}
	}
	c.exts = append(c.exts, ext{id, critical, value})
}

func (c *cert) drop(id string) {
	var left []ext
	for _, e := range c.exts {
		if e.oid != id {
			left = append(left, e)
		}
	}
	c.exts = left
}

type change = func(*cert)

const (
	idSKI        = "2.5.29.14"
	idKU         = "2.5.29.15"
	idSAN        = "2.5.29.17"
	idBC         = "2.5.29.19"
	idNC         = "2.5.29.30"
	idCRL        = "2.5.29.31"
	idPolicies   = "2.5.29.32"
	idMappings   = "2.5.29.33"
	idAKI        = "2.5.29.35"
	idPolicyCons = "2.5.29.36"
	idEKU        = "2.5.29.37"
	idInhibitAny = "2.5.29.54"
	idAIA        = "1.3.6.1.5.5.7.1.1"
	clientAuth   = "1.3.6.1.5.5.7.3.2"
	serverAuth   = "1.3.6.1.5.5.7.3.1"
	anyUsage     = "2.5.29.37.0"
	unknownUsage = "1.2.3.4"
	anyPolicy    = "2.5.29.32.0"
)

func eku(ids ...string) change {
	return func(c *cert) {
		var list [][]byte
		for _, id := range ids {
			list = append(list, oid(id))
		}
		c.set(idEKU, false, seq(list...))
	}
}

func without(id string) change { return func(c *cert) { c.drop(id) } }
func with(id string, value []byte) change {
	return func(c *cert) { c.set(id, false, value) }
}
func critical(id string, value []byte) change {
	return func(c *cert) { c.set(id, true, value) }
}
func version(v int) change { return func(c *cert) { c.version = v } }
func bare(v int) change    { return func(c *cert) { c.version, c.exts = v, nil } }
func basic(isCA bool, path int) change {
	return func(c *cert) {
		var parts [][]byte
		if isCA {
			parts = append(parts, boolean(true))
		}
		if path >= 0 {
			parts = append(parts, num(int64(path)))
		}
		c.set(idBC, true, seq(parts...))
	}
}
func valid(before, after []byte) change {
	return func(c *cert) { c.before, c.after = before, after }
}
func signed(alg string) change { return func(c *cert) { c.alg = alg } }
func keyed(spki []byte) change { return func(c *cert) { c.spki = spki } }
func subject(s []byte) change  { return func(c *cert) { c.subject = s } }
func issuer(s []byte) change   { return func(c *cert) { c.issuer = s } }
func serial(s []byte) change   { return func(c *cert) { c.serial = s } }

var (
	expired  = valid(utc("240101000000Z"), utc("250101000000Z"))
	notYet   = valid(utc("270101000000Z"), utc("280101000000Z"))
	longLife = valid(utc("200101000000Z"), utc("400101000000Z"))
)

func fresh(nm string, k *key) cert {
	return cert{
		version: 3, serial: num(5), alg: "ed25519", subject: name(nm), issuer: name(nm), spki: k.spki,
		before: utc("260101000000Z"), after: utc("270101000000Z"),
	}
}

func (c cert) encode(k *key) []byte {
	inner := c.inner
	if inner == "" {
		inner = c.alg
	}
	var parts [][]byte
	if c.version != 1 {
		parts = append(parts, el(0xa0, num(int64(c.version-1))))
	}
	parts = append(parts, c.serial, algorithms[inner].identifier, c.issuer, seq(c.before, c.after), c.subject, c.spki)
	parts = append(parts, c.unique)
	if len(c.exts) > 0 {
		var list [][]byte
		for _, e := range c.exts {
			if e.critical {
				list = append(list, seq(oid(e.oid), boolean(true), octets(e.value)))
			} else {
				list = append(list, seq(oid(e.oid), octets(e.value)))
			}
		}
		parts = append(parts, el(0xa3, seq(list...)))
	}
	tbs := seq(parts...)
	if c.mutate != nil {
		tbs = c.mutate(tbs)
	}
	sig := k.sign(algorithms[c.alg], tbs)
	if c.breakSig {
		sig[len(sig)/2] ^= 1
	}
	return cat(seq(tbs, algorithms[c.alg].identifier, bits(sig)), c.behind)
}

// root makes a self-signed authority.
func root(nm string, k *key, changes ...change) node {
	c := fresh(nm, k)
	c.set(idBC, true, seq(boolean(true)))
	for _, f := range changes {
		f(&c)
	}
	return node{c, k, c.encode(k)}
}

func (parent node) authority(nm string, k *key, changes ...change) node {
	c := fresh(nm, k)
	c.issuer = parent.c.subject
	c.set(idBC, true, seq(boolean(true)))
	for _, f := range changes {
		f(&c)
	}
	return node{c, k, c.encode(parent.k)}
}

func (parent node) leaf(nm string, changes ...change) node {
	k := edKey("leaf")
	c := fresh(nm, k)
	c.issuer = parent.c.subject
	c.subject = name(nm, "dev")
	c.set(idEKU, false, seq(oid(clientAuth)))
	for _, f := range changes {
		f(&c)
	}
	return node{c, k, c.encode(parent.k)}
}

func one(nodes ...node) []node { return nodes }

func build() {
	ca := root("ca", edKey("ca"))
	add("plain", one(ca), one(ca.leaf("alice")))
	other := root("other", edKey("other"))
	add("another authority", one(ca), one(other.leaf("alice")))
	same := root("ca", edKey("another key"))
	add("another authority of that name", one(ca), one(same.leaf("alice")))
	add("both of that name", one(ca, same), one(same.leaf("alice")))
	add("nobody is trusted", nil, one(ca.leaf("alice")))
	add("broken signature", one(ca), one(ca.leaf("alice", func(c *cert) { c.breakSig = true })))
	versions(ca)
	usages()
	validity()
	lengths()
	members(ca)
	algorithmMatrix()
	namesInSubjects(ca)
	extensions(ca)
	constraints()
	policies()
	shapes(ca)
}

func versions(ca node) {
	for v := 1; v <= 5; v++ {
		add(fmt.Sprintf("leaf of version %d without extensions", v), one(ca), one(ca.leaf("alice", bare(v))))
		add(fmt.Sprintf("leaf of version %d with extensions", v), one(ca), one(ca.leaf("alice", version(v))))
		for _, form := range []struct {
			name   string
			change change
		}{{"bare", bare(v)}, {"with extensions", version(v)}, {"without basic constraints", func(c *cert) { c.version = v; c.drop(idBC) }},
			{"not an authority", func(c *cert) { c.version = v; basic(false, -1)(c) }}} {
			r := root("r", edKey("r"), form.change)
			add(fmt.Sprintf("anchor of version %d, %s", v, form.name), one(r), one(r.leaf("alice")))
			i := ca.authority("i", edKey("i"), form.change)
			add(fmt.Sprintf("intermediate of version %d, %s", v, form.name), one(ca), one(i.leaf("alice"), i))
			add(fmt.Sprintf("intermediate as anchor, version %d, %s", v, form.name), one(i), one(i.leaf("alice")))
		}
	}
	for _, m := range []struct {
		name string
		ku   []byte
	}{{"certificate signing", []byte{3, 2, 2, 4}}, {"digital signatures", []byte{3, 2, 7, 0x80}}, {"nothing", []byte{3, 1, 0}},
		{"malformed", []byte{3, 2, 9, 4}}, {"nine bits", []byte{3, 3, 7, 4, 0x80}}, {"padding set", []byte{3, 2, 2, 7}}} {
		r := root("r", edKey("r"), critical(idKU, m.ku))
		add("anchor with key usage: "+m.name, one(r), one(r.leaf("alice")))
		i := ca.authority("i", edKey("i"), critical(idKU, m.ku))
		add("intermediate with key usage: "+m.name, one(ca), one(i.leaf("alice"), i))
		add("leaf with key usage: "+m.name, one(ca), one(ca.leaf("alice", critical(idKU, m.ku))))
	}
}

func usages() {
	sets := []struct {
		name string
		f    change
	}{
		{"none", without(idEKU)}, {"client", eku(clientAuth)}, {"server", eku(serverAuth)}, {"any", eku(anyUsage)},
		{"unknown", eku(unknownUsage)}, {"both", eku(serverAuth, clientAuth)}, {"empty", eku()},
	}
	for _, r := range sets {
		top := root("r", edKey("r"), r.f)
		for _, i := range sets {
			middle := top.authority("i", edKey("i"), i.f)
			for _, l := range sets {
				if r.name == "empty" && i.name == "empty" {
					continue
				}
				add(fmt.Sprintf("usages %s > %s > %s", r.name, i.name, l.name), one(top), one(middle.leaf("alice", l.f), middle))
			}
		}
	}
}

func validity() {
	for _, when := range []struct {
		name string
		f    change
	}{{"expired", expired}, {"not valid yet", notYet}, {"long", longLife},
		{"ending now", valid(utc("260101000000Z"), utc("260615120000Z"))},
		{"ended a second ago", valid(utc("260101000000Z"), utc("260615115959Z"))},
		{"beginning now", valid(utc("260615120000Z"), utc("270101000000Z"))},
		{"beginning in a second", valid(utc("260615120001Z"), utc("270101000000Z"))},
		{"ending before it begins", valid(utc("270101000000Z"), utc("260101000000Z"))},
		{"ending soon", valid(utc("260101000000Z"), utc("260615120001Z"))}} {
		r := root("r", edKey("r"), when.f)
		add("anchor "+when.name, one(r), one(r.leaf("alice")))
		good := root("r", edKey("r"))
		add("anchor "+when.name+", and one of the same key", one(r, good), one(r.leaf("alice")))
		i := good.authority("i", edKey("i"), when.f)
		add("intermediate "+when.name, one(good), one(i.leaf("alice"), i))
		add("leaf "+when.name, one(good), one(good.leaf("alice", when.f)))
		add("leaf with an intermediate "+when.name+" it does not need", one(good), one(good.leaf("alice"), i))
		j := good.authority("i", edKey("i"))
		add("intermediate "+when.name+", and another of the same key", one(good), one(i.leaf("alice"), i, j))
		add("another of the same key, and intermediate "+when.name, one(good), one(i.leaf("alice"), j, i))
	}
	ca := root("ca", edKey("ca"))
	for _, t := range [][]byte{
		utc("2701010000Z"), utc("270101000000+0100"), utc("270101000000-2400"), utc("270101000000+2401"), utc("270101000000+0060"),
		utc("270101000000+0000"), utc("270101000000-0000"), utc("270101000000"), utc("270101000000.5Z"), utc("270101000060Z"),
		utc("270101006000Z"), utc("270101240000Z"), utc("270132000000Z"), utc("270229000000Z"), utc("280229000000Z"),
		utc("271301000000Z"), utc("270001000000Z"), utc("270100000000Z"), utc("27 101000000Z"), utc("491231235959Z"),
		utc("500101000000Z"), utc("680101000000Z"), utc("690101000000Z"), utc("990101000000Z"), utc("270101000000z"),
		utc("2701010000+0100"), utc(""), utc("Z"), generalized("20270101000000Z"), generalized("20500101000000Z"),
		generalized("99991231235959Z"), generalized("202701010000Z"), generalized("2027010100Z"), generalized("20270101000000"),
		generalized("20270101000000.0Z"), generalized("20270101000000+0100"), generalized("00000101000000Z"),
		generalized("20270101000000+0000"), generalized("19000229000000Z"), generalized("20000229000000Z"),
		generalized("99991231235959-2300"), el(12, []byte("270101000000Z")), el(22, []byte("270101000000Z")), num(1),
	} {
		add(fmt.Sprintf("leaf until %x %s", t[0], t[2:]), one(ca), one(ca.leaf("alice", valid(utc("260101000000Z"), t))))
		add(fmt.Sprintf("leaf from %x %s", t[0], t[2:]), one(ca), one(ca.leaf("alice", valid(t, utc("270101000000Z")))))
	}
}

func lengths() {
	for path := -1; path <= 2; path++ {
		for depth := 0; depth <= 3; depth++ {
			r := root("r", edKey("r"), basic(true, path))
			top, chain := r, []node{}
			for i := 0; i < depth; i++ {
				top = top.authority(fmt.Sprintf("i%d", i), edKey(fmt.Sprintf("i%d", i)))
				chain = append([]node{top}, chain...)
			}
			add(fmt.Sprintf("anchor allows %d, %d intermediates", path, depth), one(r), append(one(top.leaf("alice")), chain...))
		}
	}
	r := root("r", edKey("r"))
	for path := -1; path <= 1; path++ {
		i := r.authority("i", edKey("i"), basic(true, path))
		j := i.authority("j", edKey("j"))
		add(fmt.Sprintf("intermediate allows %d", path), one(r), one(j.leaf("alice"), j, i))
		// Self-issued ones count, to Go.
		s := i.authority("i", edKey("i again"))
		add(fmt.Sprintf("intermediate allows %d, a self-issued one below", path), one(r), one(s.leaf("alice"), s, i))
		l := r.leaf("alice", basic(false, path))
		add(fmt.Sprintf("leaf that allows %d", path), one(r), one(l))
		n := r.authority("n", edKey("n"), basic(false, path))
		add(fmt.Sprintf("no authority, with a length of %d", path), one(r), one(n.leaf("alice"), n))
	}
	add("length below zero", one(r), one(r.leaf("alice", critical(idBC, seq(boolean(true), []byte{2, 1, 0xff})))))
	add("length beyond 64 bits", one(r), one(r.leaf("alice", critical(idBC, seq(boolean(true), []byte{2, 9, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})))))
	add("length beyond 63 bits", one(r), one(r.leaf("alice", critical(idBC, seq(boolean(true), []byte{2, 9, 0, 0x80, 0, 0, 0, 0, 0, 0, 0})))))
	// A long chain, and very many candidates.
	for _, n := range []int{5, 30, 98, 99, 100, 101} {
		top, chain := r, []node{}
		for i := 0; i < n; i++ {
			top = top.authority(fmt.Sprintf("deep %d", i), edKey(fmt.Sprintf("deep %d", i)))
			chain = append([]node{top}, chain...)
		}
		add(fmt.Sprintf("%d intermediates", n), one(r), append(one(top.leaf("alice")), chain...))
	}
	for _, n := range []int{50, 98, 99, 100, 120} {
		i := r.authority("i", edKey("i"))
		chain := one(i.leaf("alice"))
		for x := 0; x < n; x++ {
			chain = append(chain, r.authority("i", edKey(fmt.Sprintf("decoy %d", x))))
		}
		add(fmt.Sprintf("%d candidates before the right one", n), one(r), append(chain, i))
	}
}

func members(ca node) {
	i := ca.authority("i", edKey("i"))
	j := i.authority("j", edKey("j"))
	l := j.leaf("alice")
	stranger := root("stranger", edKey("stranger"))
	add("in order", one(ca), one(l, j, i))
	add("reordered", one(ca), one(l, i, j))
	add("with the anchor", one(ca), one(l, j, i, ca))
	add("twice each", one(ca), one(l, j, j, i, i))
	add("the leaf again", one(ca), one(l, l, j, i))
	add("a stranger among them", one(ca), one(l, stranger, j, i))
	add("one is missing", one(ca), one(l, j))
	add("none", one(ca), one(l))
	add("an anchor in the middle", one(i), one(l, j))
	add("an anchor in the middle, with the whole chain", one(i), one(l, j, i, ca))
	add("the direct issuer as anchor", one(j), one(l))
	add("the leaf itself as anchor", one(l), one(l))
	selfMade := root("me", edKey("me"), without(idBC), eku(clientAuth))
	add("self-signed and trusted", one(selfMade), one(selfMade))
	add("self-signed and not trusted", one(ca), one(selfMade))
	add("self-signed and trusted, below it", one(selfMade), one(selfMade.leaf("alice")))
	server := root("me", edKey("me"), without(idBC), eku(serverAuth))
	add("self-signed, trusted, for servers", one(server), one(server))
	old := root("me", edKey("me"), expired)
	add("self-signed, trusted, expired", one(old), one(old))
	add("an authority as a client", one(ca), one(ca))
	add("an intermediate as a client", one(ca), one(j, i))
	// The bundle's own order, and what is in it besides.
	add("bundle with a stranger first", one(stranger, ca), one(l, j, i))
	add("bundle with a stranger last", one(ca, stranger), one(l, j, i))
	add("bundle with the anchor twice", one(ca, ca), one(l, j, i))
	notCA := root("ca", edKey("ca"), basic(false, -1))
	add("bundle with one that is no authority, of the same key", one(notCA), one(l, j, i))
	add("bundle with both", one(notCA, ca), one(l, j, i))
	// Cross-signed: a new root that the old one vouches for, and the other way round.
	oldRoot, newRoot := root("old", edKey("old")), root("new", edKey("new"))
	cross := oldRoot.authority("new", edKey("new"))
	back := newRoot.authority("old", edKey("old"))
	leaf := newRoot.leaf("alice")
	add("cross-signed, old trusted", one(oldRoot), one(leaf, cross))
	add("cross-signed, new trusted", one(newRoot), one(leaf, cross))
	add("cross-signed, both trusted", one(oldRoot, newRoot), one(leaf, cross, back))
	add("cross-signed in a ring, nobody trusted", one(ca), one(leaf, cross, back))
	expiredOld := root("old", edKey("old"), expired)
	add("cross-signed, old expired, new trusted", one(newRoot, expiredOld), one(leaf, cross))
	add("cross-signed, old expired, only old trusted", one(expiredOld), one(leaf, cross))
	expiredCross := oldRoot.authority("new", edKey("new"), expired)
	add("cross-signature expired, new trusted", one(newRoot), one(leaf, expiredCross))
	add("cross-signature expired, old trusted", one(oldRoot), one(leaf, expiredCross))
	soonCross := oldRoot.authority("new", edKey("new"), valid(utc("260101000000Z"), utc("260616000000Z")))
	add("two paths, one ends sooner", one(oldRoot, newRoot), one(leaf, soonCross))
	add("one path, it ends soon", one(oldRoot), one(leaf, soonCross))
	// Key identifiers that match, are missing, or do not match: an order, not a rule.
	for _, a := range [][]byte{nil, {1}, {2}} {
		for _, s := range [][]byte{nil, {1}, {2}} {
			r := root("r", edKey("r"), func(c *cert) {
				if s != nil {
					c.set(idSKI, false, octets(s))
				}
			})
			add(fmt.Sprintf("key identifiers %x and %x", a, s), one(r), one(r.leaf("alice", func(c *cert) {
				if a != nil {
					c.set(idAKI, false, seq(el(0x80, a)))
				}
			})))
		}
	}
	// The same subject and key with other names: a loop or not.
	san := func(n string) change { return with(idSAN, seq(el(0x82, []byte(n)))) }
	for _, pair := range [][2]change{{san("a"), san("a")}, {san("a"), san("b")}, {san("a"), without(idSAN)}, {without(idSAN), san("a")}, {without(idSAN), without(idSAN)}} {
		x := ca.authority("x", edKey("x"), pair[0])
		y := x.authority("x", edKey("x"), pair[1])
		add("an authority below itself", one(ca), one(y.leaf("alice"), y, x))
		add("an authority below itself, trusted", one(x), one(y.leaf("alice"), y))
	}
	// Names are compared octet by octet.
	spelled := subject(seq(attr(cn, printable, []byte("ca"))))
	add("issuer in another kind of string", one(root("ca", edKey("ca"), spelled, issuer(seq(attr(cn, printable, []byte("ca")))))), one(ca.leaf("alice")))
	add("issuer in another case", one(root("CA", edKey("ca"))), one(ca.leaf("alice")))
	empty := root("e", edKey("e"), subject(seq()), issuer(seq()))
	add("empty subject", one(empty), one(empty.leaf("alice")))
	add("issuer that is its own", one(ca), one(ca.leaf("alice", issuer(name("alice", "dev")))))
}

func algorithmMatrix() {
	signers := map[string]*key{
		"rsa-512": rsaKey("rsa-512", 512, 65537), "rsa-768": rsaKey("rsa-768", 768, 65537), "rsa-1023": rsaKey("rsa-1023", 1023, 65537),
		"rsa-1024": rsaKey("rsa-1024", 1024, 65537), "rsa-1025": rsaKey("rsa-1025", 1025, 65537),
		"rsa-1536": rsaKey("rsa-1536", 1536, 65537), "rsa-2048": rsaKey("rsa-2048", 2048, 65537),
		"rsa-3072": rsaKey("rsa-3072", 3072, 65537), "rsa-2048-e3": rsaKey("rsa-2048-e3", 2048, 3),
		"rsa-2048-e4": rsaKey("rsa-2048-e4", 2048, 4), "rsa-2048-e31": rsaKey("rsa-2048-e31", 2048, 1<<31-1),
		"rsa-2048-e32": rsaKey("rsa-2048-e32", 2048, 1<<31+11),
		"p224":         ecKey("p224", elliptic.P224()), "p256": ecKey("p256", elliptic.P256()),
		"p384": ecKey("p384", elliptic.P384()), "p521": ecKey("p521", elliptic.P521()),
		"ed25519": edKey("ed"), "dsa": dsaKey("dsa"), "x25519": xKey("x"),
	}
	names := make([]string, 0, len(signers))
	for n := range signers {
		names = append(names, n)
	}
	slices.Sort(names)
	ways := make([]string, 0, len(algorithms))
	for n := range algorithms {
		ways = append(ways, n)
	}
	slices.Sort(ways)
	for _, n := range names {
		k := signers[n]
		for _, a := range ways {
			family := n[:1] == "r" && (strings.Contains(a, "rsa") || strings.Contains(a, "pss")) ||
				n[:1] == "p" && strings.HasPrefix(a, "ecdsa") || n[:1] == "e" && strings.HasPrefix(a, "ed") ||
				n == "dsa" && strings.HasPrefix(a, "dsa") || a == "unknown"
			if !family && a != "sha256-rsa" && a != "ecdsa-sha256" && a != "ed25519" {
				continue
			}
			r := root("r", k, signed(a))
			add(fmt.Sprintf("signed by %s with %s", n, a), one(r), one(r.leaf("alice", signed(a))))
		}
		// As the leaf's own key.
		ca := root("ca", edKey("ca"))
		add("leaf's key is "+n, one(ca), one(ca.leaf("alice", keyed(k.spki))))
		i := ca.authority("i", k)
		add("intermediate's key is "+n, one(ca), one(ca.leaf("alice"), i))
	}
	ca := root("ca", edKey("ca"))
	p256, rsa2048 := ecKey("p256", elliptic.P256()), rsaKey("rsa-2048", 2048, 65537)
	point, err := p256.ec.PublicKey.Bytes()
	if err != nil {
		panic(err)
	}
	compressed := append([]byte{2 + point[64]&1}, point[1:33]...)
	hybrid := append([]byte{6 + point[64]&1}, point[1:]...)
	off := append([]byte{}, point...)
	off[64] ^= 1
	for _, odd := range []struct {
		name string
		spki []byte
	}{
		{"compressed point", ecSPKI("1.2.840.10045.3.1.7", compressed)}, {"hybrid point", ecSPKI("1.2.840.10045.3.1.7", hybrid)},
		{"point off the curve", ecSPKI("1.2.840.10045.3.1.7", off)}, {"infinity", ecSPKI("1.2.840.10045.3.1.7", []byte{0})},
		{"no point", ecSPKI("1.2.840.10045.3.1.7", nil)}, {"secp256k1", ecSPKI("1.3.132.0.10", point)},
		{"point of another curve", ecSPKI("1.3.132.0.34", point)},
		{"curve in full", seq(seq(oid("1.2.840.10045.2.1"), seq(num(1))), bits(point))},
		{"no curve", seq(seq(oid("1.2.840.10045.2.1")), bits(point))},
		{"curve with something behind", seq(seq(oid("1.2.840.10045.2.1"), cat(oid("1.2.840.10045.3.1.7"), null())), bits(point))},
		{"key with something behind", seq(seq(oid("1.2.840.10045.2.1"), oid("1.2.840.10045.3.1.7")), bits(point), null())},
		{"RSA without NULL", seq(seq(oid("1.2.840.113549.1.1.1")), bits(seq(integer(rsa2048.rsaN), num(65537))))},
		{"RSA modulus below zero", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(num(-5), num(65537))))},
		{"RSA modulus zero", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(num(0), num(65537))))},
		{"RSA exponent below zero", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(integer(rsa2048.rsaN), num(-3))))},
		{"RSA exponent zero", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(integer(rsa2048.rsaN), num(0))))},
		{"RSA exponent of 9 octets", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(integer(rsa2048.rsaN), el(2, []byte{1, 0, 0, 0, 0, 0, 0, 0, 1}))))},
		{"RSA with more behind", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(cat(seq(integer(rsa2048.rsaN), num(65537), num(1)), null())))},
		{"RSA modulus padded", seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(el(2, cat([]byte{0, 0}, rsa2048.rsaN.Bytes())), num(65537))))},
		{"RSA for PSS only", seq(seq(oid("1.2.840.113549.1.1.10")), bits(seq(integer(rsa2048.rsaN), num(65537))))},
		{"Ed25519 with NULL", seq(seq(oid("1.3.101.112"), null()), bits(make([]byte, 32)))},
		{"Ed25519 of 31 octets", seq(seq(oid("1.3.101.112")), bits(make([]byte, 31)))},
		{"Ed25519 that is no point", seq(seq(oid("1.3.101.112")), bits([]byte(strings.Repeat("\xff", 32))))},
		{"Ed448", seq(seq(oid("1.3.101.113")), bits(make([]byte, 57)))},
		{"unknown algorithm", seq(seq(oid("1.2.3")), bits([]byte{1}))},
		{"bits that do not fill an octet", seq(seq(oid("1.3.101.112")), el(3, []byte{4}, make([]byte, 32)))},
		{"bits with padding that is set", seq(seq(oid("1.3.101.112")), el(3, []byte{4}, []byte(strings.Repeat("\xff", 32))))},
		{"DSA with Y zero", seq(seq(oid("1.2.840.10040.4.1"), seq(num(3), num(3), num(3))), bits(num(0)))},
		{"DSA without parameters", seq(seq(oid("1.2.840.10040.4.1")), bits(num(1)))},
		{"DSA", seq(seq(oid("1.2.840.10040.4.1"), seq(num(3), num(3), num(3))), bits(num(1)))},
	} {
		add("leaf's key: "+odd.name, one(ca), one(ca.leaf("alice", keyed(odd.spki))))
		r := root("r", rsa2048, signed("sha256-rsa"), keyed(odd.spki))
		if strings.HasPrefix(odd.name, "RSA") {
			add("anchor's key: "+odd.name, one(r), one(r.leaf("alice", signed("sha256-rsa"))))
			i := ca.authority("i", rsa2048, keyed(odd.spki))
			add("intermediate's key: "+odd.name, one(ca), one(i.leaf("alice", signed("sha256-rsa")), i))
		}
		q := root("r", p256, signed("ecdsa-sha256"), keyed(odd.spki))
		if strings.Contains(odd.name, "point") || strings.Contains(odd.name, "curve") || strings.Contains(odd.name, "key with") {
			add("anchor's key: "+odd.name, one(q), one(q.leaf("alice", signed("ecdsa-sha256"))))
		}
	}
	r := root("r", longRSAKey(), signed("sha256-rsa"))
	add("signed by an RSA key of 8676 bits", one(r), one(r.leaf("alice", signed("sha256-rsa"))))
}

func namesInSubjects(ca node) {
	for _, s := range []struct {
		name    string
		subject []byte
	}{
		{"two common names", seq(attr(cn, utf8String, []byte("first")), attr(cn, utf8String, []byte("last")))},
		{"last common name empty", seq(attr(cn, utf8String, []byte("first")), attr(cn, utf8String, nil))},
		{"two in one set", seq(set(seq(oid(cn), el(utf8String, []byte("a"))), seq(oid(org), el(utf8String, []byte("b")))))},
		{"two in one set, out of order", seq(set(seq(oid(org), el(utf8String, []byte("b"))), seq(oid(cn), el(utf8String, []byte("a")))))},
		{"an empty set", seq(set(), attr(cn, utf8String, []byte("a")))},
		{"no name", seq()}, {"no common name", seq(attr(org, utf8String, []byte("b")))},
		{"three organizations", name("a", "x", "y", "x")}, {"an empty organization", name("a", "", "y")},
		{"a UID", seq(attr(cn, utf8String, []byte("a")), attr(uid, utf8String, []byte("7")))},
		{"two UIDs", seq(attr(cn, utf8String, []byte("a")), attr(uid, utf8String, []byte("7")), attr(uid, utf8String, []byte("8")))},
		{"an empty UID", seq(attr(cn, utf8String, []byte("a")), attr(uid, utf8String, nil))},
		{"T61", seq(attr(cn, t61, []byte("zo\xeb")))}, {"T61 with controls", seq(attr(cn, t61, []byte("a\x80\x9fb")))},
		{"BMP", seq(attr(cn, bmp, []byte("\x00z\x01\x00")))}, {"BMP with an end", seq(attr(cn, bmp, []byte("\x00z\x00\x00")))},
		{"BMP with two ends", seq(attr(cn, bmp, []byte("\x00z\x00\x00\x00\x00")))}, {"empty BMP", seq(attr(cn, bmp, nil))},
		{"BMP, odd", seq(attr(cn, bmp, []byte("\x00z\x00")))}, {"BMP, surrogate", seq(attr(cn, bmp, []byte("\xd8\x00\xdc\x00")))},
		{"BMP, no character", seq(attr(cn, bmp, []byte("\xff\xfe")))}, {"BMP, no character either", seq(attr(cn, bmp, []byte("\xfd\xd0")))},
		{"printable", seq(attr(cn, printable, []byte("a*b&c '()+,-./:=?")))}, {"printable, at sign", seq(attr(cn, printable, []byte("a@b")))},
		{"printable, underscore", seq(attr(cn, printable, []byte("a_b")))}, {"printable, beyond ASCII", seq(attr(cn, printable, []byte("zo\xeb")))},
		{"IA5", seq(attr(cn, ia5, []byte("a@b")))}, {"IA5, beyond ASCII", seq(attr(cn, ia5, []byte("zo\xeb")))},
		{"numeric", seq(attr(cn, numeric, []byte("1 2")))}, {"numeric, a letter", seq(attr(cn, numeric, []byte("1a")))},
		{"universal", seq(attr(cn, universal, []byte("\x00\x00\x00a")))}, {"visible", seq(attr(cn, 26, []byte("a")))},
		{"UTF-8, broken", seq(attr(cn, utf8String, []byte("zo\xeb")))}, {"UTF-8, NUL", seq(attr(cn, utf8String, []byte("a\x00b")))},
		{"UTF-8, surrogate", seq(attr(cn, utf8String, []byte("\xed\xa0\x80")))},
		{"an integer", seq(attr(cn, 2, []byte{1}))}, {"a boolean", seq(attr(cn, 1, []byte{0xff}))},
		{"a serial number in it", seq(attr(cn, utf8String, []byte("a")), attr("2.5.4.5", printable, []byte("77")))},
		{"something behind the value", seq(set(seq(oid(cn), el(utf8String, []byte("a")), null())))},
		{"no value", seq(set(seq(oid(cn))))}, {"no type", seq(set(seq(el(utf8String, []byte("a")))))},
		{"a sequence for a set", seq(seq(seq(oid(cn), el(utf8String, []byte("a")))))},
		{"constructed", seq(attr(cn, utf8String|0x20, []byte("a")))},
	} {
		add("subject: "+s.name, one(ca), one(ca.leaf("alice", subject(s.subject))))
		r := root("r", edKey("r"), subject(s.subject), issuer(s.subject))
		add("anchor's subject: "+s.name, one(r), one(r.leaf("alice")))
	}
}

func extensions(ca node) {
	san := func(parts ...[]byte) []byte { return seq(parts...) }
	for _, e := range []struct {
		name, id string
		value    []byte
	}{
		{"unknown", "1.2.3.4", []byte{5, 0}}, {"unknown of 2.5.29", "2.5.29.99", []byte{5, 0}}, {"long 2.5.29", "2.5.29.15.1", []byte{1}},
		{"basic constraints, not a sequence", idBC, num(1)}, {"basic constraints, empty", idBC, seq()},
		{"basic constraints, false said", idBC, seq(boolean(false))}, {"basic constraints, odd true", idBC, seq([]byte{1, 1, 1})},
		{"basic constraints, more behind", idBC, cat(seq(), null())}, {"basic constraints, more within", idBC, seq(boolean(true), num(1), num(2))},
		{"key usage, no bits", idKU, num(1)}, {"key usage, more behind", idKU, cat([]byte{3, 2, 7, 0x80}, null())},
		{"EKU, not a sequence", idEKU, num(1)}, {"EKU, no identifier", idEKU, seq(num(1))}, {"EKU, more behind", idEKU, cat(seq(oid(clientAuth)), null())},
		{"SKI", idSKI, octets([]byte{1})}, {"SKI, malformed", idSKI, num(1)}, {"AKI", idAKI, seq(el(0x80, []byte{1}))},
		{"AKI, empty", idAKI, seq()}, {"AKI, malformed", idAKI, num(1)}, {"AKI by issuer", idAKI, seq(el(0xa1, []byte{}), el(0x82, []byte{1}))},
		{"AKI, constructed", idAKI, seq(el(0xa0, octets([]byte{1})))},
		{"AIA", idAIA, seq(seq(oid("1.3.6.1.5.5.7.48.1"), el(0x86, []byte("http://a"))))}, {"AIA, malformed", idAIA, num(1)},
		{"AIA, directory", idAIA, seq(seq(oid("1.3.6.1.5.5.7.48.1"), el(0xa4, seq())))}, {"AIA, no method", idAIA, seq(seq(num(1)))},
		{"CRL", idCRL, seq(seq(el(0xa0, el(0xa0, el(0x86, []byte("http://a"))))))}, {"CRL, malformed", idCRL, num(1)},
		{"CRL, relative", idCRL, seq(seq(el(0xa0, el(0xa1, []byte{}))))}, {"CRL, no name", idCRL, seq(seq(el(0x81, []byte{7, 0x80})))},
		{"CRL, directory", idCRL, seq(seq(el(0xa0, el(0xa0, el(0xa4, seq())))))}, {"CRL, no points", idCRL, seq()},
		{"policies", idPolicies, seq(seq(oid("1.2.3")))}, {"policies, twice", idPolicies, seq(seq(oid("1.2.3")), seq(oid("1.2.3")))},
		{"policies, malformed", idPolicies, num(1)}, {"policies, none", idPolicies, seq()}, {"policies, bad identifier", idPolicies, seq(seq(el(6, []byte{0x80, 1})))},
		{"policies, huge number", idPolicies, seq(seq(el(6, []byte{0x2a, 0x8f, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})))},
		{"policies, cut identifier", idPolicies, seq(seq(el(6, []byte{0x2a, 0x81})))}, {"policies, empty identifier", idPolicies, seq(seq(el(6)))},
		{"mappings, malformed", idMappings, seq(seq(oid("1.2.3")))}, {"mappings, none", idMappings, seq()},
		{"mappings", idMappings, seq(seq(oid("1.2.3"), oid("1.2.4")))},
		{"policy constraints, empty", idPolicyCons, seq()}, {"policy constraints, malformed", idPolicyCons, num(1)},
		{"policy constraints, below zero", idPolicyCons, seq(el(0x80, []byte{0xff}))},
		{"policy constraints, long", idPolicyCons, seq(el(0x80, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0}))},
		{"inhibit any, malformed", idInhibitAny, seq()}, {"inhibit any", idInhibitAny, num(0)}, {"inhibit any, below zero", idInhibitAny, num(-1)},
		{"SAN, DNS", idSAN, san(el(0x82, []byte("a.b")))}, {"SAN, none", idSAN, san()}, {"SAN, malformed", idSAN, num(1)},
		{"SAN, other name alone", idSAN, san(el(0xa0, oid("1.2.3"), el(0xa0, []byte{})))}, {"SAN, registered id", idSAN, san(el(0x88, []byte{0x2a, 3}))},
		{"SAN, beyond ASCII", idSAN, san(el(0x82, []byte("zo\xeb")))}, {"SAN, mail beyond ASCII", idSAN, san(el(0x81, []byte("zo\xeb@a")))},
		{"SAN, address of 5", idSAN, san(el(0x87, []byte{1, 2, 3, 4, 5}))}, {"SAN, address of none", idSAN, san(el(0x87))},
		{"SAN, IPv6", idSAN, san(el(0x87, make([]byte, 16)))}, {"SAN, constructed DNS", idSAN, san(el(0xa2, el(22, []byte("a"))))},
		{"SAN, odd DNS", idSAN, san(el(0x82, []byte("a b..")))}, {"SAN, odd mail", idSAN, san(el(0x81, []byte("not mail")))},
		{"SAN, universal tag", idSAN, san(el(0x02, []byte("a")))},
		{"NC, empty", idNC, seq()}, {"NC, empty permitted", idNC, seq(el(0xa0))}, {"NC, malformed", idNC, num(1)},
		{"NC, more behind", idNC, cat(seq(el(0xa0, seq(el(0x82, []byte("a"))))), null())},
		{"NC, more within", idNC, seq(el(0xa0, seq(el(0x82, []byte("a")))), null())},
		{"NC, other kind", idNC, seq(el(0xa0, seq(el(0xa4, seq()))))}, {"NC, DNS", idNC, seq(el(0xa0, seq(el(0x82, []byte("a")))))},
		{"NC, DNS ends in a dot", idNC, seq(el(0xa0, seq(el(0x82, []byte("a.")))))}, {"NC, DNS of a dot", idNC, seq(el(0xa0, seq(el(0x82, []byte(".")))))},
		{"NC, DNS beyond ASCII", idNC, seq(el(0xa0, seq(el(0x82, []byte("zo\xeb")))))}, {"NC, DNS with a space", idNC, seq(el(0xa0, seq(el(0x82, []byte("a b")))))},
		{"NC, IP of 4", idNC, seq(el(0xa0, seq(el(0x87, []byte{1, 2, 3, 4}))))}, {"NC, IP with a hole", idNC, seq(el(0xa0, seq(el(0x87, []byte{1, 2, 3, 4, 255, 0, 255, 0}))))},
		{"NC, mail", idNC, seq(el(0xa0, seq(el(0x81, []byte("a@b")))))}, {"NC, odd mail", idNC, seq(el(0xa0, seq(el(0x81, []byte("a b@c")))))},
		{"NC, URI of an address", idNC, seq(el(0xa0, seq(el(0x86, []byte("1.2.3.4")))))}, {"NC, URI", idNC, seq(el(0xa0, seq(el(0x86, []byte(".a")))))},
		{"NC, minimum said", idNC, seq(el(0xa0, seq(el(0x82, []byte("a")), el(0x80, []byte{0}))))},
	} {
		for _, crit := range []bool{false, true} {
			f := func(c *cert) { c.set(e.id, crit, e.value) }
			add(fmt.Sprintf("leaf with %s, critical %v", e.name, crit), one(ca), one(ca.leaf("alice", f)))
			i := ca.authority("i", edKey("i"), f)
			add(fmt.Sprintf("intermediate with %s, critical %v", e.name, crit), one(ca), one(i.leaf("alice"), i))
			r := root("r", edKey("r"), f)
			add(fmt.Sprintf("anchor with %s, critical %v", e.name, crit), one(r), one(r.leaf("alice")))
		}
	}
	twice := func(c *cert) { c.exts = append(c.exts, ext{"1.2.3", false, null()}, ext{"1.2.3", false, null()}) }
	add("an extension twice", one(ca), one(ca.leaf("alice", twice)))
	for _, u := range []string{
		"spiffe://cluster.local/ns/a", "https://a b/", "https://a:b/", "https://[::1]:80/", "https://[::1/", "urn:a:b", "a:b", ":a", "1a:b",
		"https://a%41/", "https://a/%zz", "https://a./", "https://u@a/", "https://u:p@a:1/", "https://u ser@a/", "*", "", "//a", "///a", "/a/b", "a/b:c", "a:b:c",
		"https://a:b:80/", "x://a:b:80/", "https://[1.2.3.4]/", "https://[fe80::1%25en0]/", "https://[fe80::1%en0]/", "https://a?b#c%zz", "https://a/#%41", "https://a\x01",
		"https://.a/", "https://a..b/", "https://", "https:///a", "https://a_b", "https://a;b", "https://a\"b", "https://a|b", "https://%c3%a9/", "HTTPS://A/",
	} {
		add("leaf with a URI "+u, one(ca), one(ca.leaf("alice", with(idSAN, seq(el(0x86, []byte(u)))))))
		i := ca.authority("i", edKey("i"), critical(idNC, seq(el(0xa1, seq(el(0x86, []byte("other.example")))))))
		add("leaf below a URI constraint with "+u, one(ca), one(i.leaf("alice", with(idSAN, seq(el(0x86, []byte(u))))), i))
	}
}

func constraints() {
	type name struct {
		tag   byte
		value string
	}
	bases := []name{
		{0x82, "example.com"}, {0x82, ".example.com"}, {0x82, "www.example.com"}, {0x82, ""}, {0x82, "EXAMPLE.com"}, {0x82, "com"},
		{0x81, "example.com"}, {0x81, ".example.com"}, {0x81, "me@example.com"}, {0x81, "Me@EXAMPLE.com"},
		{0x86, "example.com"}, {0x86, ".example.com"},
		{0x87, "\x0a\x00\x00\x00\xff\x00\x00\x00"}, {0x87, "\x0a\x01\x02\x03\xff\x00\x00\x00"}, {0x87, "\x00\x00\x00\x00\x00\x00\x00\x00"},
		{0x87, strings.Repeat("\x00", 32)}, {0x87, strings.Repeat("\x00", 10) + "\xff\xff\x0a\x00\x00\x00" + strings.Repeat("\xff", 12) + "\xff\x00\x00\x00"},
	}
	own := []name{
		{0x82, "example.com"}, {0x82, "www.example.com"}, {0x82, "WWW.Example.Com"}, {0x82, "anexample.com"}, {0x82, "*.example.com"}, {0x82, "*.com"}, {0x82, "a.www.example.com"},
		{0x82, "example.com."}, {0x82, "a b"}, {0x82, ""}, {0x81, "me@example.com"}, {0x81, "Me@example.com"}, {0x81, "you@www.example.com"}, {0x81, "nobody"}, {0x81, "\"me\"@example.com"},
		{0x86, "https://example.com/a"}, {0x86, "https://www.example.com:80/"}, {0x86, "https://10.0.0.1/"}, {0x86, "urn:a"},
		{0x87, "\x0a\x00\x00\x01"}, {0x87, "\x0a\xff\xff\xff"}, {0x87, "\x0b\x00\x00\x01"}, {0x87, strings.Repeat("\x00", 15) + "\x01"},
		{0x87, strings.Repeat("\x00", 10) + "\xff\xff\x0a\x00\x00\x01"},
	}
	ca := root("ca", edKey("ca"))
	for i, a := range own {
		for _, b := range own[i:] {
			names := with(idSAN, seq(el(a.tag, []byte(a.value)), el(b.tag, []byte(b.value))))
			add(fmt.Sprintf("server for %x %q and %x %q", a.tag, a.value, b.tag, b.value), one(ca), one(ca.leaf("server", eku(serverAuth), names)))
		}
	}
	for _, list := range []byte{0xa0, 0xa1} {
		for _, b := range bases {
			nc := critical(idNC, seq(el(list, seq(el(b.tag, []byte(b.value))))))
			i := ca.authority("i", edKey("i"), nc)
			for _, n := range own {
				add(fmt.Sprintf("constraint %x %x %q against %x %q", list, b.tag, b.value, n.tag, n.value), one(ca),
					one(i.leaf("alice", with(idSAN, seq(el(n.tag, []byte(n.value))))), i))
			}
			r := root("r", edKey("r"), nc)
			add(fmt.Sprintf("anchor's constraint %x %x %q, no names", list, b.tag, b.value), one(r), one(r.leaf("alice")))
			add(fmt.Sprintf("anchor's constraint %x %x %q", list, b.tag, b.value), one(r), one(r.leaf("alice", with(idSAN, seq(el(0x82, []byte("www.example.com")))))))
			add(fmt.Sprintf("leaf's own constraint %x %x %q", list, b.tag, b.value), one(ca), one(ca.leaf("alice", nc, with(idSAN, seq(el(0x82, []byte("other")))))))
		}
	}
	// Several at once, in orders that matter to a search.
	s := newStream("constraints")
	words := []string{"a", "b", "a-a", "a.b", "example"}
	domain := func() string {
		var labels []string
		for n := 1 + s.below(3); n > 0; n-- {
			labels = append(labels, words[s.below(len(words))])
		}
		return strings.Join(labels, ".")
	}
	for x := 0; x < 400; x++ {
		var lists [2][][]byte
		for n := 1 + s.below(5); n > 0; n-- {
			base, dot := domain(), ""
			if s.below(4) == 0 {
				dot = "."
			}
			to := s.below(2)
			if s.below(3) == 0 {
				ip := []byte{10, byte(s.below(3)), byte(s.below(3)), byte(s.below(4)), 255, 0, 0, 0}
				ip[5] = []byte{0, 255, 254}[s.below(3)]
				lists[to] = append(lists[to], seq(el(0x87, ip)))
			} else {
				lists[to] = append(lists[to], seq(el(0x82, []byte(dot+base))))
			}
		}
		var parts [][]byte
		for i, l := range lists {
			if len(l) > 0 {
				parts = append(parts, el(0xa0+byte(i), l...))
			}
		}
		i := ca.authority("i", edKey("i"), critical(idNC, seq(parts...)))
		var own [][]byte
		for n := 1 + s.below(3); n > 0; n-- {
			switch d := domain(); s.below(4) {
			case 0:
				own = append(own, el(0x82, []byte("*."+d)))
			case 1:
				own = append(own, el(0x87, []byte{10, byte(s.below(3)), byte(s.below(3)), byte(s.below(4))}))
			default:
				own = append(own, el(0x82, []byte(d)))
			}
		}
		add(fmt.Sprintf("constraints at random %d", x), one(ca), one(i.leaf("alice", with(idSAN, seq(own...))), i))
	}
}

func policies() {
	list := func(ids ...string) change {
		var parts [][]byte
		for _, id := range ids {
			parts = append(parts, seq(oid(id)))
		}
		return with(idPolicies, seq(parts...))
	}
	require := func(n int64) change { return critical(idPolicyCons, seq(el(0x80, []byte{byte(n)}))) }
	inhibitMap := func(n int64) change { return critical(idPolicyCons, seq(el(0x81, []byte{byte(n)}))) }
	inhibitAny := func(n int64) change { return critical(idInhibitAny, num(n)) }
	mapped := func(from, to string) change { return with(idMappings, seq(seq(oid(from), oid(to)))) }
	both := func(fs ...change) change {
		return func(c *cert) {
			for _, f := range fs {
				f(c)
			}
		}
	}
	none := func(*cert) {}
	const a, b = "1.2.3.1", "1.2.3.2"
	ca := root("ca", edKey("ca"))
	uppers := map[string]change{
		"none": none, "a": list(a), "any": list(anyPolicy), "a required": both(list(a), require(0)), "required": require(0), "required later": require(1),
		"a required later": both(list(a), require(1)), "any required": both(list(anyPolicy), require(0)),
		"any inhibited, required": both(list(anyPolicy), require(0)), "a to b, required": both(list(a), mapped(a, b), critical(idPolicyCons, seq(el(0x80, []byte{0})))),
		"a to any": both(list(a), mapped(a, anyPolicy)), "any, a to b, required": both(list(anyPolicy), mapped(a, b), require(0)),
		"mapping inhibited": both(list(a), mapped(a, b), inhibitMap(0)), "any inhibited at once": both(list(anyPolicy), inhibitAny(0), require(0)),
	}
	lowers := map[string]change{
		"none": none, "a": list(a), "b": list(b), "any": list(anyPolicy), "a and b": list(a, b), "required": require(0), "a required": both(list(a), require(0)), "mapped": both(list(a), mapped(a, b)),
	}
	names := func(m map[string]change) []string {
		var out []string
		for n := range m {
			out = append(out, n)
		}
		slices.Sort(out)
		return out
	}
	for _, u := range names(uppers) {
		i := ca.authority("i", edKey("i"), uppers[u])
		for _, m := range names(lowers) {
			j := i.authority("j", edKey("j"), lowers[m])
			add(fmt.Sprintf("policies %s > %s", u, m), one(ca), one(i.leaf("alice", lowers[m]), i))
			for _, l := range names(lowers) {
				add(fmt.Sprintf("policies %s > %s > %s", u, m, l), one(ca), one(j.leaf("alice", lowers[l]), j, i))
			}
		}
		// A self-issued one does not count down.
		s := i.authority("i", edKey("i again"), list(anyPolicy))
		add("policies "+u+", a self-issued one", one(ca), one(s.leaf("alice", list(a)), s, i))
		r := root("r", edKey("r"), uppers[u])
		add("policies of the anchor: "+u, one(r), one(r.leaf("alice")))
	}
}

func shapes(ca node) {
	for _, s := range [][]byte{num(0), num(-1), num(127), el(2), el(2, []byte{0, 1}), el(2, []byte{0xff, 0xff}), el(2, []byte{0, 0x80}),
		el(2, []byte(strings.Repeat("\x7f", 20))), el(2, []byte(strings.Repeat("\x7f", 40))), el(10, []byte{1}), el(2, []byte{0x80})} {
		add(fmt.Sprintf("serial %x", s), one(ca), one(ca.leaf("alice", serial(s))))
		r := root("r", edKey("r"), serial(s))
		add(fmt.Sprintf("anchor's serial %x", s), one(r), one(r.leaf("alice")))
	}
	add("inner algorithm differs", one(ca), one(ca.leaf("alice", func(c *cert) { c.inner = "ecdsa-sha256" })))
	add("something behind", one(ca), one(ca.leaf("alice", func(c *cert) { c.behind = null() })))
	for v := 1; v <= 3; v++ {
		for _, u := range [][]byte{el(0x81, []byte{0, 1}), el(0x82, []byte{0, 1}), cat(el(0x81, []byte{0}), el(0x82, []byte{0})), el(0xa1, []byte{0}), null()} {
			add(fmt.Sprintf("version %d with %x behind the key", v, u), one(ca), one(ca.leaf("alice", func(c *cert) { c.version, c.unique = v, u })))
		}
	}
	for n := range 3 {
		cut := func(b []byte) []byte { return b[:len(b)-n-1] }
		add(fmt.Sprintf("cut by %d", n+1), one(ca), one(ca.leaf("alice", func(c *cert) { c.mutate = cut })))
	}
	// Octets changed at random before it is signed: what still parses is well signed.
	s := newStream("mutations")
	i := ca.authority("i", edKey("i"), basic(true, 1), with(idSKI, octets([]byte{1, 2, 3})), critical(idKU, []byte{3, 2, 2, 4}),
		critical(idNC, seq(el(0xa0, seq(el(0x82, []byte("example.com"))), seq(el(0x87, []byte{10, 0, 0, 0, 255, 0, 0, 0}))))),
		with(idPolicies, seq(seq(oid("1.2.3")), seq(oid(anyPolicy)))), critical(idPolicyCons, seq(el(0x80, []byte{0}), el(0x81, []byte{1}))))
	rich := []change{
		with(idSAN, seq(el(0x82, []byte("www.example.com")), el(0x81, []byte("me@example.com")), el(0x87, []byte{10, 0, 0, 1}), el(0x86, []byte("https://u:p@www.example.com:80/a?b#c")))),
		with(idAKI, seq(el(0x80, []byte{1, 2, 3}))), with(idPolicies, seq(seq(oid("1.2.3")))), critical(idKU, []byte{3, 2, 5, 0xa0}),
		with(idCRL, seq(seq(el(0xa0, el(0xa0, el(0x86, []byte("http://a"))))))), with(idAIA, seq(seq(oid("1.3.6.1.5.5.7.48.1"), el(0x86, []byte("http://a"))))),
		subject(seq(attr(cn, printable, []byte("alice")), attr(org, t61, []byte("d\xe9v")), attr(uid, bmp, []byte("\x00a\x00b")))),
	}
	add("rich", one(ca), one(i.leaf("alice", rich...), i))
	for x := range mutations {
		kind := x % 3
		mutate := func(b []byte) []byte {
			out := append([]byte{}, b...)
			for n := 1 + s.below(2); n > 0; n-- {
				at := s.below(len(out))
				switch s.below(4) {
				case 0:
					out[at] ^= 1 << s.below(8)
				case 1:
					out[at] = byte(s.below(256))
				case 2:
					out[at] = []byte{0, 1, 0x7f, 0x80, 0xff, 0x30, 0x31, 0xa0, 0xa3, 2, 3, 4, 5, 6, 12, 19, 20, 22, 23, 24, 30, '.', '@', ' '}[s.below(24)]
				default:
					out[at]++
				}
			}
			return out
		}
		mutated := func(c *cert) { c.mutate = mutate }
		switch kind {
		case 0:
			add(fmt.Sprintf("mutated leaf %d", x), one(ca), one(i.leaf("alice", append(rich, mutated)...), i))
		case 1:
			m := i
			m.c.mutate = mutate
			m.der = m.c.encode(ca.k)
			add(fmt.Sprintf("mutated intermediate %d", x), one(ca), one(i.leaf("alice", rich...), m))
		default:
			m := ca
			m.c.mutate = mutate
			m.der = m.c.encode(ca.k)
			add(fmt.Sprintf("mutated anchor %d", x), one(m), one(i.leaf("alice", rich...), i))
		}
	}
}
