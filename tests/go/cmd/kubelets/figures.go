package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// stall is how long a request takes that a person would notice.
const stall = time.Second

// keptTexts is how many messages of errors are kept.
const keptTexts = 20

// counters count from the start.
type counters struct {
	// Ready counts kubelets all of whose watches are open.
	Ready int64 `json:"ready"`
	// Requests that were answered, watches excluded.
	Requests int64 `json:"requests"`
	// Errors: requests that failed, or were answered by a status that a kubelet does not expect.
	Errors int64 `json:"errors"`
	// Broken: watches that ended by an error. Early: those that ended as if all had been said, but before their time.
	Broken int64 `json:"broken"`
	Early  int64 `json:"early"`
	// Dials: connections that were opened. Open: those that are.
	Dials int64 `json:"dials"`
	Open  int64 `json:"open"`
}

// times are those of requests since "measure" or "mark", in milliseconds.
type times struct {
	Count   int     `json:"count"`
	Average float64 `json:"average"`
	P50     float64 `json:"p50"`
	P90     float64 `json:"p90"`
	P95     float64 `json:"p95"`
	P99     float64 `json:"p99"`
	Max     float64 `json:"max"`
	// Stalls took more than a second.
	Stalls int `json:"stalls"`
	// Fresh opened their connection.
	Fresh  int `json:"fresh"`
	Errors int `json:"errors"`
	// WatchErrors: watches that were not begun.
	WatchErrors int      `json:"watch_errors"`
	Texts       []string `json:"error_texts"`
}

// sample is one request; until it has ended it has taken as long as it has been under way.
type sample struct {
	began, ended   time.Time
	fresh, failed  bool
	isWatchRefused bool
}

// figures are those of one group.
type figures struct {
	ready, requests, errors, broken, early, dials, open atomic.Int64

	mutex   sync.Mutex
	samples []*sample
	texts   []string
	// mark is when "mark" was said.
	mark time.Time
}

func newFigures() *figures { return &figures{} }

func (f *figures) counters() counters {
	return counters{
		Ready: f.ready.Load(), Requests: f.requests.Load(), Errors: f.errors.Load(),
		Broken: f.broken.Load(), Early: f.early.Load(), Dials: f.dials.Load(), Open: f.open.Load(),
	}
}

func (f *figures) forget() {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.samples, f.texts, f.mark = nil, nil, time.Time{}
}

// note begins another part of what is measured.
func (f *figures) note(now time.Time) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.mark = now
}

// begin is of a request that goes out now.
func (f *figures) begin() *sample {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	one := &sample{began: time.Now()}
	f.samples = append(f.samples, one)
	return one
}

func (f *figures) took(one *sample, fresh bool) {
	f.requests.Add(1)
	f.mutex.Lock()
	defer f.mutex.Unlock()
	one.ended, one.fresh = time.Now(), fresh
}

func (f *figures) fail(one *sample, format string, args ...any) {
	f.mutex.Lock()
	one.ended, one.failed = time.Now(), true
	f.mutex.Unlock()
	f.say(format, args...)
}

// refuse is of a watch that was not begun.
func (f *figures) refuse(began time.Time, format string, args ...any) {
	f.mutex.Lock()
	f.samples = append(f.samples, &sample{began: began, ended: time.Now(), isWatchRefused: true})
	f.mutex.Unlock()
	f.say(format, args...)
}

func (f *figures) say(format string, args ...any) {
	f.errors.Add(1)
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if len(f.texts) < keptTexts {
		f.texts = append(f.texts, fmt.Sprintf(format, args...))
	}
}

// sinceMark is of the requests that began after "mark"; nothing without one.
func (f *figures) sinceMark() times {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if f.mark.IsZero() {
		return times{}
	}
	return f.times(f.mark)
}

// all is of all requests since "measure".
func (f *figures) all() times {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	t := f.times(time.Time{})
	t.Texts = slices.Clone(f.texts)
	return t
}

// times is of the requests that began after then, those that failed and those under way with the time they have taken;
// the mutex is held.
func (f *figures) times(then time.Time) times {
	var sorted []float64
	var t times
	now := time.Now()
	for _, one := range f.samples {
		switch {
		case one.began.Before(then):
			continue
		case one.isWatchRefused:
			t.WatchErrors++
			continue
		case one.failed:
			t.Errors++
		case one.fresh:
			t.Fresh++
		}
		ended := one.ended
		if ended.IsZero() {
			ended = now
		}
		sorted = append(sorted, float64(ended.Sub(one.began))/float64(time.Millisecond))
	}
	slices.Sort(sorted)
	t.Count = len(sorted)
	if len(sorted) == 0 {
		return t
	}
	sum := 0.0
	for _, ms := range sorted {
		sum += ms
		if ms > float64(stall/time.Millisecond) {
			t.Stalls++
		}
	}
	at := func(share float64) float64 { return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)] }
	t.Average = sum / float64(len(sorted))
	t.P50, t.P90, t.P95, t.P99, t.Max = at(0.5), at(0.9), at(0.95), at(0.99), sorted[len(sorted)-1]
	return t
}

// watches is how many each kubelet has open.
const watches = 5

// timer is above a kubelet's HTTP transport: each request is timed until its answer has been read, and watches are counted.
type timer struct {
	next    http.RoundTripper
	figures *figures
	open    *atomic.Int32
}

func (t *timer) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.URL.Query().Get("watch") == "true" {
		return t.watch(request)
	}
	var fresh atomic.Bool
	trace := &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) { fresh.Store(!got.Reused) }}
	one := t.figures.begin()
	response, err := t.next.RoundTrip(request.WithContext(httptrace.WithClientTrace(request.Context(), trace)))
	if err != nil {
		t.figures.fail(one, "%s %s: %v", request.Method, request.URL.Path, err)
		return response, err
	}
	// Not found and conflict are what a kubelet asks about.
	if response.StatusCode >= http.StatusBadRequest && response.StatusCode != http.StatusNotFound && response.StatusCode != http.StatusConflict {
		t.figures.fail(one, "%s %s: answered %s", request.Method, request.URL.Path, response.Status)
		return response, nil
	}
	response.Body = &timedBody{ReadCloser: response.Body, done: func(err error) {
		if err != nil {
			t.figures.fail(one, "%s %s: its answer ended: %v", request.Method, request.URL.Path, err)
			return
		}
		t.figures.took(one, fresh.Load())
	}}
	return response, nil
}

func (t *timer) watch(request *http.Request) (*http.Response, error) {
	asked := time.Now()
	response, err := t.next.RoundTrip(request)
	if err != nil {
		if request.Context().Err() == nil {
			t.figures.refuse(asked, "watch %s: %v", request.URL.Path, err)
		}
		return response, err
	}
	if response.StatusCode != http.StatusOK {
		t.figures.refuse(asked, "watch %s: answered %s", request.URL.Path, response.Status)
		return response, nil
	}
	if t.open.Add(1) == watches {
		t.figures.ready.Add(1)
	}
	began := time.Now()
	response.Body = &timedBody{ReadCloser: response.Body, done: func(err error) {
		if t.open.Add(-1) == watches-1 {
			t.figures.ready.Add(-1)
		}
		if request.Context().Err() != nil {
			return
		}
		if err != nil {
			t.figures.broken.Add(1)
		} else if time.Since(began) < wanted(request) {
			t.figures.early.Add(1)
		}
	}}
	return response, nil
}

// wanted is how long a watch is asked to last; a second less, for clocks and the way.
func wanted(request *http.Request) time.Duration {
	seconds, err := strconv.Atoi(request.URL.Query().Get("timeoutSeconds"))
	if err != nil {
		return 0
	}
	return time.Duration(seconds-1) * time.Second
}

// timedBody says once that it has ended, and by what error if neither its server nor its reader ended it.
type timedBody struct {
	io.ReadCloser
	once sync.Once
	done func(error)
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.once.Do(func() {
			if err == io.EOF {
				b.done(nil)
			} else {
				b.done(err)
			}
		})
	}
	return n, err
}

func (b *timedBody) Close() error {
	b.once.Do(func() { b.done(nil) })
	return b.ReadCloser.Close()
}

// connection counts itself.
type connection struct {
	net.Conn
	once    sync.Once
	figures *figures
}

func (f *figures) dial(ctx context.Context, network, address string) (net.Conn, error) {
	raw, err := (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	f.dials.Add(1)
	f.open.Add(1)
	return &connection{Conn: raw, figures: f}, nil
}

func (c *connection) Close() error {
	c.once.Do(func() { c.figures.open.Add(-1) })
	return c.Conn.Close()
}
