// Package boot is what every process of the mesh does once, around its real
// work: write logs, name goroutines, say when it is ready, answer its operator
// and leave in order.
//
//	main: flags → SignalContext → NewQueue + NewLogger → NewGroup
//	                                 │                     ├─ "admin"   AdminMux
//	                                 │                     ├─ "metrics" Metrics
//	                                 │                     └─ the component's own goroutines
//	                                 └─ LevelControl, changed by AdminMux at run time
//
// Everything exported is safe for concurrent use. The package starts two kinds
// of goroutine: one per Queue, ended by Close, and those of a Group, ended by
// Wait. It knows nothing of the mesh.
package boot
