// Package filters has a decider of the name and the shape the real one has, so that a binary is built in seconds.
package filters

// Request stands for net/http's.
type Request struct{ RemoteAddr string }

// Decider is called as the apiserver calls it.
type Decider interface{ Goaway(r *Request) bool }

type probabilisticGoawayDecider struct {
	chance float64
	next   func() float64
}

func (p *probabilisticGoawayDecider) Goaway(r *Request) bool {
	return p.next() < p.chance
}

// New makes one.
func New(chance float64, next func() float64) Decider {
	return &probabilisticGoawayDecider{chance: chance, next: next}
}
