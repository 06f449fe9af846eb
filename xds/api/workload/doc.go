// Package workload is the workload view that the control plane serves to node proxies (generated).
package workload
