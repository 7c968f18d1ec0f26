package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
)

// connections remembers a client's open connections in the order they were dialled.
type connections struct {
	mutex sync.Mutex
	open  []*connection
	stats *stats
}

type connection struct {
	net.Conn
	owner *connections
	once  sync.Once
}

func (c *connections) dial(ctx context.Context, network, address string) (net.Conn, error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c.stats.add(func(l *line) { l.Dials++ })
	conn := &connection{Conn: raw, owner: c}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.open = append(c.open, conn)
	return conn, nil
}

// newestPort is the local port of the newest open connection, 0 without one.
//
// After a GOAWAY the older one stays open for its watch, and new requests go to the newest.
func (c *connections) newestPort() int {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if len(c.open) == 0 {
		return 0
	}
	return c.open[len(c.open)-1].LocalAddr().(*net.TCPAddr).Port
}

// end closes what is open, as a process does that ends.
func (c *connections) end() {
	c.mutex.Lock()
	open := append([]*connection(nil), c.open...)
	c.mutex.Unlock()
	for _, conn := range open {
		_ = conn.Close()
	}
}

func (c *connection) Close() error {
	c.once.Do(func() {
		c.owner.mutex.Lock()
		defer c.owner.mutex.Unlock()
		for i, other := range c.owner.open {
			if other == c {
				c.owner.open = append(c.owner.open[:i], c.owner.open[i+1:]...)
				break
			}
		}
	})
	return c.Conn.Close()
}

// counter sits above the client's HTTP transport and counts what comes out of it.
type counter struct {
	next     http.RoundTripper
	stats    *stats
	listed   atomic.Bool
	watching *atomic.Int32
}

func (c *counter) RoundTrip(request *http.Request) (*http.Response, error) {
	query := request.URL.Query()
	watch := query.Get("watch") == "true" || query.Get("watch") == "1"
	list := request.Method == http.MethodGet && ((watch && query.Get("sendInitialEvents") == "true") || (!watch && isCollection(request.URL)))
	c.stats.add(func(l *line) {
		l.Requests++
		if list && c.listed.Load() {
			l.Relists++
		}
		if watch && !list {
			l.Resumes++
		}
	})

	response, err := c.next.RoundTrip(request)
	if err != nil {
		if request.Context().Err() == nil || errors.Is(request.Context().Err(), context.DeadlineExceeded) {
			c.stats.failed("%s %s: %v", request.Method, request.URL.Path, err)
		}
		return response, err
	}
	if response.StatusCode >= http.StatusBadRequest {
		c.stats.failed("%s %s: answered %s", request.Method, request.URL.Path, response.Status)
		return response, nil
	}
	if list {
		c.listed.Store(true)
	}
	if watch {
		c.watching.Add(1)
		response.Body = &watchBody{ReadCloser: response.Body, counter: c, context: request.Context()}
	}
	return response, nil
}

// isCollection tells .../namespaces/NS/configmaps from .../namespaces/NS/configmaps/NAME.
func isCollection(u *url.URL) bool {
	const suffix = "/configmaps"
	return len(u.Path) > len(suffix) && u.Path[len(u.Path)-len(suffix):] == suffix
}

// watchBody sees how a watch's response ends.
type watchBody struct {
	io.ReadCloser
	context context.Context
	counter *counter
	closed  atomic.Bool
	ended   sync.Once
}

func (b *watchBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.ended.Do(func() {
			b.counter.watching.Add(-1)
			// A client that ends gives its watch up itself.
			if err != io.EOF && !b.closed.Load() && b.context.Err() == nil {
				b.counter.stats.watchBroke("watch: body ended in: %v", err)
			}
		})
	}
	return n, err
}

func (b *watchBody) Close() error {
	b.closed.Store(true)
	b.ended.Do(func() { b.counter.watching.Add(-1) })
	return b.ReadCloser.Close()
}
