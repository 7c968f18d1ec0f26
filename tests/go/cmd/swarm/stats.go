package main

import (
	"fmt"
	"math"
	"sync"
	"time"
)

// line is what the swarm says each second.
type line struct {
	Mark        int      `json:"mark"`
	Clients     int      `json:"clients"`
	Ready       int      `json:"ready"`
	Requests    uint64   `json:"requests"`
	Stalls      uint64   `json:"stalls"`
	Errors      uint64   `json:"errors"`
	ErrorTexts  []string `json:"error_texts"`
	Relists     uint64   `json:"relists"`
	WatchBreaks uint64   `json:"watch_breaks"`
	Resumes     uint64   `json:"watch_resumes"`
	Events      uint64   `json:"events"`
	Missed      uint64   `json:"missed"`
	Doubled     uint64   `json:"doubled"`
	Writes      uint64   `json:"writes"`
	Dials       uint64   `json:"dials"`
	LatencyMS   latency  `json:"latency_ms"`
	// Ports holds the local port of each client's newest open connection.
	Ports []int `json:"ports"`
}

type latency struct {
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
	Count uint64  `json:"count"`
}

// keptTexts bounds the error texts that are kept: the newest.
const keptTexts = 10

// stall is from when on a small request has stalled.
const stall = time.Second

// stats holds everything that counts from the last reset.
type stats struct {
	mutex   sync.Mutex
	current line
	times   histogram
}

func newStats() *stats { return &stats{} }

func (s *stats) reset() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.current = line{Mark: s.current.Mark + 1}
	s.times = histogram{}
}

func (s *stats) mark() {
	s.add(func(l *line) { l.Mark++ })
}

func (s *stats) line() line {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	l := s.current
	l.ErrorTexts = append([]string{}, l.ErrorTexts...)
	l.LatencyMS = s.times.latency()
	return l
}

func (s *stats) add(change func(*line)) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	change(&s.current)
}

func (s *stats) took(d time.Duration) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.times.add(d)
	if d > stall {
		s.current.Stalls++
	}
}

func (s *stats) failed(format string, args ...any) {
	s.add(func(l *line) {
		l.Errors++
		l.remember(fmt.Sprintf(format, args...))
	})
}

func (s *stats) watchBroke(format string, args ...any) {
	s.add(func(l *line) {
		l.WatchBreaks++
		l.remember(fmt.Sprintf(format, args...))
	})
}

func (l *line) remember(text string) {
	l.ErrorTexts = append(l.ErrorTexts, text)
	if len(l.ErrorTexts) > keptTexts {
		l.ErrorTexts = l.ErrorTexts[1:]
	}
}

// histogram counts durations in buckets 5 % wide, from 10 microseconds up.
type histogram struct {
	buckets [400]uint64
	count   uint64
	max     time.Duration
}

const (
	histogramBase  = float64(10 * time.Microsecond)
	histogramRatio = 1.05
)

func (h *histogram) add(d time.Duration) {
	i := 0
	if f := float64(d); f > histogramBase {
		i = min(int(math.Log(f/histogramBase)/math.Log(histogramRatio))+1, len(h.buckets)-1)
	}
	h.buckets[i]++
	h.count++
	h.max = max(h.max, d)
}

func (h *histogram) quantile(q float64) float64 {
	rank := uint64(math.Ceil(q * float64(h.count)))
	var seen uint64
	for i, n := range h.buckets {
		if seen += n; n > 0 && seen >= rank {
			upper := histogramBase * math.Pow(histogramRatio, float64(i))
			return milliseconds(min(upper, float64(h.max)))
		}
	}
	return 0
}

func (h *histogram) latency() latency {
	return latency{
		P50: h.quantile(0.50), P90: h.quantile(0.90), P99: h.quantile(0.99),
		Max: milliseconds(float64(h.max)), Count: h.count,
	}
}

// milliseconds with two decimals, as they are read by people.
func milliseconds(nanoseconds float64) float64 {
	return math.Round(nanoseconds/1e4) / 100
}
