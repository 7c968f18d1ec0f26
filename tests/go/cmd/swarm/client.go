package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// client is one client-go client: a transport, a reflector and a small request now and then.
type client struct {
	connections
	watching   atomic.Int32
	configmaps typedcorev1.ConfigMapInterface
	limit      time.Duration
	sequence   sequence
}

func newClient(config *rest.Config, o options, stats *stats) (*client, error) {
	c := &client{limit: o.requestTimeout, sequence: sequence{stats: stats}}
	c.connections.stats = stats
	// A dial function of its own also keeps client-go from sharing one transport, and so one connection,
	// among clients of equal TLS configuration.
	config.Dial = c.dial
	config.ContentType = runtime.ContentTypeProtobuf
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return &counter{next: next, stats: stats, watching: &c.watching}
	})
	core, err := typedcorev1.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	c.configmaps = core.ConfigMaps(o.namespace)
	return c, nil
}

// run makes the first request, starts the reflector on the same connection, and goes on with small requests.
func (c *client) run(ctx context.Context, delay, period time.Duration) {
	if !sleep(ctx, delay) {
		return
	}
	c.get(ctx)
	lw := &cache.ListWatch{ListWithContextFunc: c.list, WatchFuncWithContext: c.watch}
	reflector := cache.NewReflectorWithOptions(lw, &corev1.ConfigMap{}, cache.NewStore(cache.MetaNamespaceKeyFunc), cache.ReflectorOptions{Name: "swarm"})
	go reflector.RunWithContext(ctx)
	for {
		// Between half and one and a half periods.
		if !sleep(ctx, period/2+rand.N(period)) {
			return
		}
		c.get(ctx)
	}
}

// get reads the object from the apiserver's cache, as a kubelet would. Its failure is counted by the transport.
func (c *client) get(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	began := time.Now()
	if _, err := c.configmaps.Get(ctx, hotObject, metav1.GetOptions{ResourceVersion: "0"}); err == nil {
		c.sequence.stats.took(time.Since(began))
	}
}

func (c *client) list(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	list, err := c.configmaps.List(ctx, options)
	if err != nil {
		return nil, err
	}
	c.sequence.forget()
	for i := range list.Items {
		c.sequence.initial(&list.Items[i])
	}
	return list, nil
}

func (c *client) watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	initial := options.SendInitialEvents != nil && *options.SendInitialEvents
	source, err := c.configmaps.Watch(ctx, options)
	if err != nil {
		return nil, err
	}
	if initial {
		c.sequence.forget()
	}
	return watch.Filter(source, func(event watch.Event) (watch.Event, bool) {
		initial = c.sequence.observe(event, initial)
		return event, true
	}), nil
}

// write changes the object at each period, with the next number in it.
func (c *client) write(ctx context.Context, period time.Duration) {
	var object *corev1.ConfigMap
	for sleep(ctx, period) {
		limited, cancel := context.WithTimeout(ctx, c.limit)
		if object == nil {
			// At the start, and after a failure: what is stored now says whether the last change counted.
			object, _ = c.configmaps.Get(limited, hotObject, metav1.GetOptions{})
		}
		if object != nil && object.Name == hotObject {
			object.Data = map[string]string{sequenceKey: strconv.FormatUint(number(object)+1, 10)}
			updated, err := c.configmaps.Update(limited, object, metav1.UpdateOptions{})
			if err == nil {
				object = updated
				c.sequence.stats.add(func(l *line) { l.Writes++ })
			} else {
				object = nil
			}
		} else {
			object = nil
		}
		cancel()
	}
}

// sequence checks that a client's watch shows each number once and in order.
//
// A LIST or a watch with initial events starts it anew: what lies between is not missed but skipped.
type sequence struct {
	stats *stats
	last  uint64
	known bool
}

func (s *sequence) forget() { s.known = false }

func (s *sequence) initial(object *corev1.ConfigMap) {
	if object.Name == hotObject {
		s.last, s.known = number(object), true
	}
}

// observe takes one event and tells whether the events to come are still initial ones.
func (s *sequence) observe(event watch.Event, initial bool) bool {
	if event.Type == watch.Error {
		if status, ok := event.Object.(*metav1.Status); !ok || !madeByClient(status) {
			s.stats.watchBroke("watch: ERROR event: %v", describe(event.Object))
		}
		return initial
	}
	object, ok := event.Object.(*corev1.ConfigMap)
	if !ok {
		return initial
	}
	switch {
	case event.Type == watch.Bookmark:
		return initial && object.Annotations[metav1.InitialEventsAnnotationKey] != "true"
	case initial:
		s.initial(object)
	case object.Name == hotObject:
		next := number(object)
		s.stats.add(func(l *line) {
			l.Events++
			if s.known && next <= s.last {
				l.Doubled++
			} else if s.known && next > s.last+1 {
				l.Missed += next - s.last - 1
			}
		})
		s.last, s.known = max(next, s.last), true
	}
	return initial
}

// madeByClient tells the ERROR event that client-go makes when a body breaks, which watchBody has counted already.
func madeByClient(status *metav1.Status) bool {
	if status.Details == nil {
		return false
	}
	for _, cause := range status.Details.Causes {
		if cause.Type == "ClientWatchDecoding" || cause.Type == metav1.CauseTypeUnexpectedServerResponse {
			return true
		}
	}
	return false
}

func describe(object runtime.Object) string {
	if status, ok := object.(*metav1.Status); ok {
		return fmt.Sprintf("%d %s: %s", status.Code, status.Reason, status.Message)
	}
	return fmt.Sprintf("%T", object)
}

func number(object *corev1.ConfigMap) uint64 {
	n, _ := strconv.ParseUint(object.Data[sequenceKey], 10, 64)
	return n
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
