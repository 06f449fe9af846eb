package peer

import (
	"encoding/json"
	"fmt"
	"net"
	"strconv"
)

// config is the file that makes a program the same hop as the others: every path
// of one address to one server, HTTP/1.1, connections kept on both sides, as many
// workers as are given, no access log. All else is as the program has it.
func (h Hop) config(dir string) (name, text string, err error) {
	host, port, err := net.SplitHostPort(h.Listen)
	if err != nil {
		return "", "", fmt.Errorf("listen address %q: %w", h.Listen, err)
	}
	toHost, toPort, err := net.SplitHostPort(h.To)
	if err != nil {
		return "", "", fmt.Errorf("server address %q: %w", h.To, err)
	}
	switch h.Kind {
	case Nginx:
		return "nginx.conf", fmt.Sprintf(nginxConf, h.Workers, dir, h.To, h.Listen), nil
	case HAProxy:
		return "haproxy.cfg", fmt.Sprintf(haproxyCfg, h.Workers, h.Listen, h.To), nil
	case Envoy:
		text, err := envoyBootstrap(host, port, toHost, toPort)
		return "envoy.json", text, err
	}
	return "", "", fmt.Errorf("kind %q: want %s, %s or %s", h.Kind, Envoy, HAProxy, Nginx)
}

// https://nginx.org/en/docs/http/ngx_http_upstream_module.html#keepalive says what
// keeps connections to a server. Without the numbers nginx ends each after 1000
// requests.
const nginxConf = `user root;
worker_processes %[1]d;
daemon off;
pid %[2]s/pid;
error_log stderr error;
events { worker_connections 8192; }
http {
  access_log off;
  client_body_temp_path %[2]s/body;
  proxy_temp_path %[2]s/proxy;
  fastcgi_temp_path %[2]s/fastcgi;
  uwsgi_temp_path %[2]s/uwsgi;
  scgi_temp_path %[2]s/scgi;
  upstream server {
    server %[3]s;
    keepalive 256;
    keepalive_requests 1000000000;
  }
  server {
    listen %[4]s;
    keepalive_requests 1000000000;
    location / {
      proxy_pass http://server;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
    }
  }
}
`

// http-reuse always: a connection to the server is used by whoever comes next, as
// the others do (https://docs.haproxy.org/2.6/configuration.html#http-reuse).
const haproxyCfg = `global
  nbthread %[1]d
  maxconn 8192
defaults
  mode http
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend hop
  bind %[2]s
  default_backend server
backend server
  server server %[3]s
`

// envoyBootstrap is a bootstrap of
// https://www.envoyproxy.io/docs/envoy/latest/api-v3/config/bootstrap/v3/bootstrap.proto:
// one listener, one static cluster, the router filter and nothing else.
func envoyBootstrap(host, port, toHost, toPort string) (string, error) {
	type object = map[string]any
	address := func(host, port string) (object, error) {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q: %w", port, err)
		}
		return object{"socket_address": object{"address": host, "port_value": n}}, nil
	}
	listen, err := address(host, port)
	if err != nil {
		return "", err
	}
	to, err := address(toHost, toPort)
	if err != nil {
		return "", err
	}
	const types = "type.googleapis.com/envoy.extensions.filters."
	manager := object{
		"@type": types + "network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "hop", "codec_type": "HTTP1",
		"route_config": object{"name": "hop", "virtual_hosts": []object{{"name": "hop", "domains": []string{"*"},
			"routes": []object{{"match": object{"prefix": "/"}, "route": object{"cluster": "server"}}}}}},
		"http_filters": []object{{"name": "envoy.filters.http.router", "typed_config": object{"@type": types + "http.router.v3.Router"}}},
	}
	b, err := json.MarshalIndent(object{"static_resources": object{
		"listeners": []object{{"name": "hop", "address": listen, "filter_chains": []object{{
			"filters": []object{{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}}}}}},
		"clusters": []object{{"name": "server", "type": "STATIC", "connect_timeout": "5s", "load_assignment": object{"cluster_name": "server",
			"endpoints": []object{{"lb_endpoints": []object{{"endpoint": object{"address": to}}}}}}}},
	}}, "", " ")
	return string(b) + "\n", err
}
